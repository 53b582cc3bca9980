// The ops byol_forward.cuda and byol_backward.cuda: one launch in each direction, linear in the views.
//
// A warp handles a sample, or a block if rows are long. With two views the forward reads the rows of a pair once, for
// both norms and the inner product. With more views it first computes the targets' norms and the sum of the unit
// targets, which stays in shared memory (or in a workspace if a row does not fit). Squares are summed in float32; if a
// sum leaves float32's range, the row is read again in double. The backward is elementwise.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/byol.h"
#include "cuda/byol_rows.h"

namespace selfsup_kernels::cuda {

namespace {

using torch::headeronly::ScalarType;

// Resident blocks per SM, which leave a thread 64, 80 or 128 registers.
constexpr int blocks_wanted(int group_warps, bool pairs) {
  return group_warps == 1 ? (pairs ? 4 : 3) : (pairs ? 3 : 2);
}
// Each view takes two pointers and two strides of a kernel's arguments. More views are copied into one tensor.
constexpr int max_views = 48;
constexpr int max_blocks = 4 * threads;  // the last block adds up their sums, four per thread
constexpr int64_t warp_columns = 1024;   // longer rows take a block each

// Row a of view v begins at first[v] + a * stride[v]. With more than max_views views it begins at
// first[0] + v * apart + a * stride[0].
template <typename T>
struct Rows {
  const T* first[max_views];
  int64_t stride[max_views];
  int64_t apart;

  __device__ const T* row(int view, int64_t sample) const {
    return apart ? first[0] + view * apart + sample * stride[0] : first[view] + sample * stride[view];
  }
};

template <typename T>
struct ForwardParameters {
  Rows<T> p, t;
  float *loss, *stats;
  double* workspace;  // an arrival count and the blocks' sums; null if the losses are not reduced
  float* sums;        // a row for each block; null if the sums are in shared memory
  int64_t batch, dim;
  int views;
  double eps, others, factor;
};

template <typename T>
struct BackwardParameters {
  Rows<T> p, t;
  const float *grad, *stats;
  T* out;
  int64_t grad_view_stride, grad_row_stride, batch, dim;
  int views;
  float factor;
};

// True if a float32 sum of squares is accurate: no significant term left float32's range. False for NaN.
__device__ inline bool in_range(float squares) { return squares > 1e-30f && squares < 1e38f; }
__device__ inline float reciprocal(float squares, float eps) {
  const float norm = sqrtf(squares);
  return norm < eps ? -1 / eps : 1 / norm;
}

// Adds up the blocks' sums, in a fixed order, in the block that arrives last.
//
// The arrival count starts uninitialised, since zeroing it would take another launch. A block that finds a count
// without the mark swaps it for the mark with zero arrivals; if the swap fails, another block has done it. The last
// block removes the mark, so that later launches and graph replays start over. Every call has its own workspace.
__device__ inline void add_up(double sum, double* workspace, double factor, float* loss, double* scratch) {
  constexpr unsigned long long mark = 0x7fa5b1c3d2e60000ull;  // its upper 48 bits occur in no computed number
  auto count = reinterpret_cast<unsigned long long*>(workspace);
  volatile double* sums = workspace + 1;
  const unsigned blocks = gridDim.x * gridDim.y;
  const int thread = threadIdx.x;
  if (thread == 0) {
    sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    __threadfence();
    const unsigned long long found = atomicAdd(count, 0ull);
    if ((found & ~0xffffull) != mark) atomicCAS(count, found, mark);
    scratch[threads] = atomicAdd(count, 1ull) - mark == blocks - 1;
  }
  __syncthreads();
  if (scratch[threads] == 0) return;
  __threadfence();
  double mine = 0;
  for (unsigned k = thread; k < blocks; k += threads) mine += sums[k];
  scratch[thread] = mine;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) scratch[thread] += scratch[thread + half];
  }
  if (thread == 0) {
    *loss = static_cast<float>(scratch[0] * factor);
    atomicExch(count, 0ull);
  }
}
constexpr size_t scratch_bytes = (threads + 1) * sizeof(double);

template <typename T, int n, int group_warps, bool pairs>
SK_KERNEL(threads, blocks_wanted(group_warps, pairs))
byol_forward_kernel(SK_GRID_CONSTANT(ForwardParameters<T>) in) {
  constexpr int groups = warps / group_warps;
  const Group<group_warps> group;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t rows = in.views * in.batch, step = int64_t(gridDim.x) * groups;
  float *of_p = in.stats, *of_t = of_p + rows, *of_cosines = of_t + rows;
  const float eps = static_cast<float>(in.eps);
  double total = 0;

  auto finish = [&](int64_t i, float cosines) {
    if (group.rank != 0) return;
    const double value = byol_loss(cosines, in.others);
    of_cosines[i] = cosines;
    if (in.workspace)
      total += value;
    else
      in.loss[i] = static_cast<float>(value);
  };

  for (int64_t a = int64_t(blockIdx.x) * groups + threadIdx.x / Group<group_warps>::width; a < in.batch; a += step) {
    if constexpr (pairs) {
      const int u = blockIdx.y, v = in.views - 1 - u;
      const T *p = in.p.row(u, a), *t = in.t.row(v, a);
      float sums[3];
      products<T, n>(sums, p, t, in.dim, group, scratch);
      float rp = reciprocal(sums[0], eps), rt = reciprocal(sums[1], eps);
      float cosine = sums[2] * fabsf(rp) * fabsf(rt);
      if (!in_range(sums[0]) || !in_range(sums[1])) {
        double wide[3];
        wide_sums(wide, in.dim, group, scratch, [&](int64_t at, double (&sum)[3]) {
          const double x = static_cast<float>(p[at]), y = static_cast<float>(t[at]);
          sum[0] += x * x;
          sum[1] += y * y;
          sum[2] += x * y;
        });
        rp = signed_reciprocal<float>(sqrt(wide[0]), in.eps);
        rt = signed_reciprocal<float>(sqrt(wide[1]), in.eps);
        cosine = static_cast<float>(wide[2] * fabs(double(rp)) * fabs(double(rt)));
      }
      if (group.rank == 0) {
        of_p[u * in.batch + a] = rp;
        of_t[v * in.batch + a] = rt;
      }
      finish(u * in.batch + a, cosine);
    } else {
      float* sum = in.sums ? in.sums + int64_t(blockIdx.x) * in.dim
                           : reinterpret_cast<float*>(shared_memory() + scratch_bytes) +
                                 threadIdx.x / Group<group_warps>::width * ((in.dim + 3) / 4 * 4);
      group.wait();  // until the sum of the previous sample has been read
      for (int v = 0; v < in.views; ++v) {
        const T* t = in.t.row(v, a);
        float sums[3];
        products<T, n>(sums, t, t, in.dim, group, scratch);
        float rt = reciprocal(sums[0], eps);
        if (!in_range(sums[0])) {
          double wide[1];
          wide_sums(wide, in.dim, group, scratch, [&](int64_t at, double (&sum)[1]) {
            const double x = static_cast<float>(t[at]);
            sum[0] += x * x;
          });
          rt = signed_reciprocal<float>(sqrt(wide[0]), in.eps);
        }
        if (group.rank == 0) of_t[v * in.batch + a] = rt;
        const float size = fabsf(rt);
        // Each thread owns its columns of the sum, except in wide_sums.
        for_packs<T, n, Group<group_warps>::width>(t, t, in.dim, group.rank, [&](int64_t at, const auto& x, auto&) {
#pragma unroll
          for (int k = 0; k < n; ++k) sum[at + k] = v ? sum[at + k] + x[k] * size : x[k] * size;
        });
      }
      group.wait();
      for (int u = 0; u < in.views; ++u) {
        const int64_t i = u * in.batch + a;
        const T *p = in.p.row(u, a), *t = in.t.row(u, a);
        const float size = fabsf(of_t[i]);
        float sums[2];
        products_with_sum<T, n>(sums, p, t, size, sum, in.dim, group, scratch);
        float rp = reciprocal(sums[0], eps);
        float cosines = sums[1] * fabsf(rp);
        if (!in_range(sums[0])) {
          double wide[2];
          wide_sums(wide, in.dim, group, scratch, [&](int64_t at, double (&result)[2]) {
            const double x = static_cast<float>(p[at]);
            result[0] += x * x;
            result[1] += x * (sum[at] - static_cast<float>(t[at]) * size);
          });
          rp = signed_reciprocal<float>(sqrt(wide[0]), in.eps);
          cosines = static_cast<float>(wide[1] * fabs(double(rp)));
        }
        if (group.rank == 0) of_p[i] = rp;
        finish(i, cosines);
      }
    }
  }

  if (in.workspace == nullptr) return;
  __syncthreads();  // until the scratch is free
  if (group.rank == 0) scratch[threadIdx.x / Group<group_warps>::width] = total;
  __syncthreads();
  total = 0;
  for (int g = 0; g < groups; ++g) total += scratch[g];
  add_up(total, in.workspace, in.factor, in.loss, scratch);
}

// Clamps to float16's range the gradient of a row shorter than eps: 1 / eps may be too large for it. NaN stays NaN.
template <typename T>
__device__ inline float clamped(float x, bool floored) {
  if (sizeof(T) == 2 && std::is_same_v<T, Half> && floored) {
    if (x > 65504.0f) return 65504.0f;
    if (x < -65504.0f) return -65504.0f;
  }
  return x;
}

// The columns that a warp handles at once: of one row (pairs), or of all rows of a sample.
template <typename T, int n>
constexpr int backward_columns = 32 * n * in_flight<T, n>;

template <typename T, int n, bool pairs>
SK_KERNEL(threads, blocks_wanted(1, true))
byol_backward_kernel(SK_GRID_CONSTANT(BackwardParameters<T>) in) {
  const int64_t a = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (a >= in.batch) return;
  constexpr int many = in_flight<T, n>;
  const int64_t rows = in.views * in.batch;
  const float *of_p = in.stats, *of_t = of_p + rows, *of_cosines = of_t + rows;
  for (int64_t start = int64_t(blockIdx.z) * backward_columns<T, n>; start < in.dim;
       start += int64_t(gridDim.z) * backward_columns<T, n>) {
    const int64_t column = start + threadIdx.x % 32 * n;
    float sum[many][n] = {};
    if constexpr (!pairs)
      for (int v = 0; v < in.views; ++v) {
        const T* t = in.t.row(v, a);
        const float size = fabsf(of_t[v * in.batch + a]);
#pragma unroll
        for (int j = 0; j < many; ++j)
          if (column + j * 32 * n < in.dim) {
            RowPack<T, n> x;
            x.read(t + column + j * 32 * n);
#pragma unroll
            for (int k = 0; k < n; ++k) sum[j][k] += x[k] * size;
          }
      }
    for (int u = pairs ? blockIdx.y : 0; u < (pairs ? int(blockIdx.y) + 1 : in.views); ++u) {
      const int v = pairs ? in.views - 1 - u : u;
      const int64_t i = u * in.batch + a;
      const T *p = in.p.row(u, a), *t = in.t.row(v, a);
      RowPack<T, n> x[many], y[many];
#pragma unroll
      for (int j = 0; j < many; ++j)
        if (column + j * 32 * n < in.dim) {
          x[j].read(p + column + j * 32 * n);
          y[j].read(t + column + j * 32 * n);
        }
      const float rp = of_p[i], size = fabsf(of_t[v * in.batch + a]);
      const float upstream = in.grad[u * in.grad_view_stride + a * in.grad_row_stride] * in.factor;
      const ByolGradient<float> gradient(rp, of_cosines[i], upstream);
#pragma unroll
      for (int j = 0; j < many; ++j)
        if (column + j * 32 * n < in.dim) {
#pragma unroll
          for (int k = 0; k < n; ++k) {
            const float opposite = pairs ? y[j][k] * size : sum[j][k] - y[j][k] * size;
            x[j].raw[k] = static_cast<T>(clamped<T>(gradient(opposite, x[j][k]), rp < 0));
          }
          x[j].write(in.out + i * in.dim + column + j * 32 * n);
        }
    }
  }
}

// ---------------------------------------------------------------- host side

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The views, with contiguous rows. Copies views with strided rows, and all views if there are more than max_views.
struct Views {
  std::vector<Tensor> kept;
  bool aligned = true;  // every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long

  Views(const std::vector<Tensor>& views, const Tensor& like) {
    const int64_t batch = like.size(0), dim = like.size(1), item = like.element_size();
    if (views.size() > max_views) {
      const int64_t sizes[] = {static_cast<int64_t>(views.size()), batch, dim};
      Tensor all = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 3));
      for (size_t v = 0; v < views.size(); ++v) {
        Tensor to = torch::stable::select(all, 0, v);
        check(views[v], like);
        torch::stable::copy_(to, views[v]);
      }
      kept.push_back(all);
      aligned = dim * item % 16 == 0;
      return;
    }
    for (const Tensor& v : views) {
      check(v, like);
      kept.push_back(v.stride(1) == 1 || dim == 1 ? v : torch::stable::contiguous(v));
      aligned = aligned && reinterpret_cast<uintptr_t>(kept.back().const_data_ptr()) % 16 == 0 &&
                kept.back().stride(0) * item % 16 == 0 && dim * item % 16 == 0;
    }
  }

  template <typename T>
  Rows<T> rows() const {
    Rows<T> r{};
    const bool together = kept[0].dim() == 3;
    for (size_t v = 0; v < kept.size(); ++v) {
      r.first[v] = static_cast<const T*>(kept[v].const_data_ptr());
      r.stride[v] = kept[v].stride(together ? 1 : 0);
    }
    r.apart = together ? kept[0].stride(0) : 0;
    return r;
  }

 private:
  static void check(const Tensor& v, const Tensor& like) {
    STD_TORCH_CHECK(
        on_this_device(v) && v.get_device_index() == like.get_device_index() && v.scalar_type() == like.scalar_type() &&
            v.dim() == 2 && v.size(0) == like.size(0) && v.size(1) == like.size(1),
        "byol: expected CUDA matrices of one device, dtype and shape");
  }
};

template <typename Run>
void with_kind(ScalarType dtype, bool aligned, const Run& run) {
  auto with = [&](auto zero) {
    using T = decltype(zero);
    if (aligned)
      run(zero, std::integral_constant<int, 16 / sizeof(T)>());
    else
      run(zero, std::integral_constant<int, 1>());
  };
  if (dtype == ScalarType::Float) return with(0.0f);
  if (dtype == ScalarType::BFloat16) return with(BFloat16());
  if (dtype == ScalarType::Half) return with(Half());
  STD_TORCH_CHECK(false, "byol: expected float32, bfloat16 or float16");
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

void check_lists(const std::vector<Tensor>& predictions, const std::vector<Tensor>& targets) {
  STD_TORCH_CHECK(
      !predictions.empty() && predictions.size() == targets.size() && predictions[0].dim() == 2 &&
          predictions.size() < 65536,
      "byol: expected two equal lists of matrices");
}

}  // namespace

std::tuple<Tensor, Tensor> byol_forward(
    std::vector<Tensor> predictions, std::vector<Tensor> targets, double eps, int64_t reduction) {
  check_lists(predictions, targets);
  const Tensor& like = predictions[0];
  const Device device(like);
  const Views p(predictions, like), t(targets, like);
  const int64_t views = predictions.size(), batch = like.size(0), dim = like.size(1);
  const bool pairs = views <= 2, long_rows = dim > warp_columns;
  Tensor stats = new_floats(like, {3, views, batch});
  Tensor loss = reduction == 0 ? new_floats(like, {views, batch}) : new_floats(like, {});

  const int64_t floats = (long_rows ? 1 : warps) * ((dim + 3) / 4 * 4);  // per block, for the sum of the targets
  size_t shared = scratch_bytes + (pairs ? 0 : floats * sizeof(float));
  const bool spills = shared > static_cast<size_t>(device.shared_limit());
  // Enough blocks to fill the device once. Each takes several samples, so that few sums remain to be added up.
  const int64_t resident =
      std::min<int64_t>(device.processors() * (spills ? 2 : blocks_wanted(long_rows ? warps : 1, pairs)), max_blocks);
  const int64_t blocks = std::max<int64_t>(
      1, std::min(ceil_divide(batch, long_rows ? 1 : warps), std::max<int64_t>(1, resident / (pairs ? views : 1))));
  Tensor workspace, sums;
  if (reduction != 0) workspace = new_floats(like, {1 + blocks * (pairs ? views : 1)}, ScalarType::Double);
  if (spills) {
    sums = new_floats(like, {blocks, dim});
    shared = scratch_bytes;
  }

  with_kind(like.scalar_type(), p.aligned && t.aligned, [&](auto zero, auto numbers) {
    using T = decltype(zero);
    constexpr int n = decltype(numbers)::value;
    const ForwardParameters<T> parameters{
        p.rows<T>(),
        t.rows<T>(),
        static_cast<float*>(loss.mutable_data_ptr()),
        static_cast<float*>(stats.mutable_data_ptr()),
        reduction != 0 ? static_cast<double*>(workspace.mutable_data_ptr()) : nullptr,
        spills ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr,
        batch,
        dim,
        static_cast<int>(views),
        eps,
        static_cast<double>(std::max<int64_t>(views - 1, 1)),
        reduction == 1 ? 1.0 / static_cast<double>(views * batch) : 1.0};
    const dim3 grid(static_cast<unsigned>(blocks), pairs ? static_cast<unsigned>(views) : 1);
    auto kernel = pairs ? (long_rows ? byol_forward_kernel<T, n, warps, true> : byol_forward_kernel<T, n, 1, true>)
                        : (long_rows ? byol_forward_kernel<T, n, warps, false> : byol_forward_kernel<T, n, 1, false>);
    device.launch(kernel, grid, threads, shared, parameters);
  });
  return {loss, stats};
}

Tensor byol_backward(
    Tensor grad, std::vector<Tensor> predictions, std::vector<Tensor> targets, Tensor stats, int64_t reduction) {
  check_lists(predictions, targets);
  const Tensor& like = predictions[0];
  const Device device(like);
  const Views p(predictions, like), t(targets, like);
  const int64_t views = predictions.size(), batch = like.size(0), dim = like.size(1);
  const bool pairs = views <= 2;
  STD_TORCH_CHECK(
      on_this_device(grad) && grad.scalar_type() == ScalarType::Float && on_this_device(stats) &&
          stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && stats.numel() == 3 * views * batch,
      "byol_backward: expected the gradient and the statistics of byol_forward");
  const int64_t sizes[] = {views, batch, dim};
  Tensor out = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 3));
  const bool each = grad.dim() == 2;
  const double slope = byol_slope(static_cast<double>(std::max<int64_t>(views - 1, 1)));

  with_kind(like.scalar_type(), p.aligned && t.aligned, [&](auto zero, auto numbers) {
    using T = decltype(zero);
    constexpr int n = decltype(numbers)::value;
    const BackwardParameters<T> parameters{
        p.rows<T>(),
        t.rows<T>(),
        static_cast<const float*>(grad.const_data_ptr()),
        static_cast<const float*>(stats.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        each ? grad.stride(0) : 0,
        each ? grad.stride(1) : 0,
        batch,
        dim,
        static_cast<int>(views),
        static_cast<float>(reduction == 1 ? slope / static_cast<double>(views * batch) : slope)};
    const int64_t pieces = std::min<int64_t>(ceil_divide(dim, backward_columns<T, n>), 32768);
    const dim3 grid(
        static_cast<unsigned>(ceil_divide(batch, warps)),
        pairs ? static_cast<unsigned>(views) : 1,
        static_cast<unsigned>(pieces));
    auto kernel = pairs ? byol_backward_kernel<T, n, true> : byol_backward_kernel<T, n, false>;
    device.launch(kernel, grid, threads, 0, parameters);
  });
  return out;
}

}  // namespace selfsup_kernels::cuda

SK_CUDA_LIBRARY(m) {
  m.impl("byol_forward.cuda", TORCH_BOX(&selfsup_kernels::cuda::byol_forward));
  m.impl("byol_backward.cuda", TORCH_BOX(&selfsup_kernels::cuda::byol_backward));
}
