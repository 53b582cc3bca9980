// First and last pass over the rows: read and normalise them; turn the gradient of unit rows into that of the input.
// A warp works on a row.
#include "cuda/info_nce.h"

namespace selfsup_kernels::cuda {

namespace {

constexpr int warps = 4;
// A kernel's arguments are at most 4 KB for drivers of before CUDA 12.1.
constexpr int most_views = 240;

struct Sources {
  const void* base[most_views];
  int64_t stride[most_views];
};

static_assert(sizeof(Sources) + sizeof(Problem) + sizeof(Number) + 10 * 8 <= 4096);

// Which of the user's rows a stored row holds.
struct Place {
  int view, sample;
  bool valid;
};
__device__ Place place_of(const Problem& p, int row, const int64_t* order) {
  if (p.labels) {
    const bool valid = row < p.batch;
    return {row % p.user_views, valid ? static_cast<int>(order[row / p.user_views]) : 0, valid};
  }
  return {row / p.padded, row % p.padded, row % p.padded < p.batch};
}

// `first`: of the stored rows that are written; `queue`: they are the queue's.
template <typename T>
SK_KERNEL(32 * warps, 1)
load_rows_kernel(
    SK_GRID_CONSTANT(Sources) sources,
    Problem p,
    bool queue,
    int count,
    int first,
    const int64_t* order,
    T* stored,
    float* rnorm,
    float* sums,
    float* state,
    Number temperature,
    double eps) {
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / 32);
  if (!queue && blockIdx.x == 0 && threadIdx.x == 0) {
    const double t = temperature.read();
    state[state_scale] = t > 0 && t < INFINITY ? static_cast<float>(1 / t) : NAN;
  }
  if (row >= count) return;
  const Place place = queue ? Place{0, row, row < p.queue} : place_of(p, row, order);
  const T* from = static_cast<const T*>(sources.base[place.view]) + place.sample * sources.stride[place.view];
  double square = 0;
  if (place.valid)
    for (int d = lane; d < p.dim; d += 32) {
      const double h = static_cast<float>(from[d]);
      square += h * h;
    }
  square = warp_sum(square);
  double reciprocal = 1;
  if (p.normalize) {
    const double norm = sqrt(square);
    reciprocal = norm < eps ? -1 / eps : 1 / norm;
  } else {
    // Positive floats are ordered as integers are. An infinite row does not lift the bound for the others.
    const float longest = static_cast<float>(fmin(square, 3.4e38));
    if (lane == 0 && square < INFINITY) atomicMax(reinterpret_cast<int*>(state + state_norm), __float_as_int(longest));
    if (lane == 0 && !(square < INFINITY)) state[state_infinite] = 1;
  }
  T* to = stored + static_cast<int64_t>(first + row) * p.stride;
  for (int d = lane; d < p.stride; d += 32) {
    const bool inside = place.valid && d < p.dim;  // padding is zeros whatever 1 / eps is
    to[d] = static_cast<T>(inside ? static_cast<float>(static_cast<float>(from[d]) * fabs(reciprocal)) : 0.0f);
  }
  // The queue's part of rnorm has no padding: its length is how the backward knows that of the queue.
  if (lane == 0 && (!queue || row < p.queue)) rnorm[first + row] = static_cast<float>(reciprocal);
  if (!queue)
    for (int c = lane; c < p.columns(); c += 32) sums[static_cast<int64_t>(c) * p.rows() + row] = 0;
}

// What the rows' gradients are scaled by: weight = constant * grad.
struct Scaling {
  Number grad;
  double constant;
  float unscale;  // 1 / factor of the partial sums
};

template <typename T>
SK_KERNEL(32 * warps, 1)
finish_rows_kernel(
    Problem p,
    const T* stored,
    const float* rnorm,
    const float* coef,
    const float* upstream,
    const float* state,
    const int64_t* order,
    float* partial,
    int splits,
    Scaling scaling,
    T* out,
    double* parts) {
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / 32);
  if (row >= p.rows()) return;
  const Place place = place_of(p, row, order);
  if (!place.valid || !p.owns(place.sample)) {
    if (parts && lane == 0) parts[row] = 0;
    return;
  }
  const int64_t size = static_cast<int64_t>(p.views) * p.part_rows() * p.stride;
  const int64_t at = static_cast<int64_t>(row) * p.stride;
  const int part_row = p.labels ? row : place.view * p.part_rows() + place.sample - p.part_first();
  float* own_partial = partial + static_cast<int64_t>(part_row) * p.stride;
  const float scale = state[state_scale];
  const double weight = scaling.constant * scaling.grad.read();
  const float own = upstream ? upstream[row] : 1.0f;

  // In the batch a score has both its rows here, and each of them all of its gradient; one with the queue has one.
  double inside = 0, along = 0;
  for (int d = lane; d < p.dim; d += 32) {
    float sum = 0;
    for (int k = 0; k < splits; ++k) sum += own_partial[k * size + d];
    sum *= scaling.unscale;
    if (!p.labels)
      for (int v = 0; v < p.views; ++v) {
        if (v == place.view) continue;
        const int other = v * p.padded + place.sample;
        const float there = upstream ? upstream[other] : 1.0f;
        const float both = own * coef[static_cast<int64_t>(v) * p.rows() + row] +
                           there * coef[static_cast<int64_t>(place.view) * p.rows() + other];
        sum += both * static_cast<float>(stored[static_cast<int64_t>(other) * p.stride + d]);
      }
    const float z = static_cast<float>(stored[at + d]);
    inside += static_cast<double>(z) * sum;
    if (p.queue) sum += own_partial[splits * size + d] * scaling.unscale;
    along += static_cast<double>(z) * sum;
    own_partial[d] = sum;  // for the second pass; this row's alone
  }
  inside = warp_sum(inside);
  along = warp_sum(along);
  if (parts && lane == 0) parts[row] = -static_cast<double>(scale) * scale * (0.5 * inside + (along - inside)) * weight;

  const float factor = static_cast<float>(scale * weight);
  const float r = p.normalize ? rnorm[row] : 1.0f;
  const bool floored = r < 0;
  // Below the floor the norm is a constant: no projection.
  const float projection = p.normalize && !floored ? static_cast<float>(along) : 0.0f;
  T* to = out + (static_cast<int64_t>(place.view) * p.count + place.sample - p.first) * p.dim;
  for (int d = lane; d < p.dim; d += 32) {
    float dz = (own_partial[d] - static_cast<float>(stored[at + d]) * projection) * factor * fabsf(r);
    // dz / eps of a zero row is finite in float32 only. NaN stays.
    if (std::is_same_v<T, Half> && floored && dz == dz) dz = fminf(fmaxf(dz, -65504.0f), 65504.0f);
    to[d] = static_cast<T>(dz);
  }
}

}  // namespace

Stored load_rows(
    const Device& device,
    const Problem& p,
    const std::vector<Tensor>& views,
    const std::optional<Tensor>& queue,
    const int64_t* order,
    Number temperature,
    double eps) {
  STD_TORCH_CHECK(
      views.size() <= most_views,
      "impl='cuda' takes at most ",
      most_views,
      " views, got ",
      views.size(),
      "; use impl='reference'");
  const ScalarType dtype = views[0].scalar_type();
  Stored s{
      new_tensor(views[0], {p.rows() + p.queue_padded, p.stride}, dtype),
      new_tensor(views[0], {p.rows() + p.queue}, ScalarType::Float),
      new_tensor(views[0], {p.columns(), p.rows()}, ScalarType::Float),
      torch::stable::new_zeros(views[0], std::vector<int64_t>{state_size}, ScalarType::Float)};
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto fill = [&](const std::vector<Tensor>& from, bool is_queue, int count, int first) {
      Sources sources{};
      std::vector<Tensor> packed;  // until the launch
      for (size_t v = 0; v < from.size(); ++v) {
        packed.push_back(from[v].stride(1) == 1 || from[v].size(1) == 1 ? from[v] : torch::stable::contiguous(from[v]));
        sources.base[v] = packed.back().data_ptr();
        sources.stride[v] = packed.back().stride(0);
      }
      device.launch(
          load_rows_kernel<T>,
          dim3(ceil_div(count, warps)),
          32 * warps,
          0,
          sources,
          p,
          is_queue,
          count,
          first,
          order,
          pointer<T>(s.rows),
          pointer<float>(s.rnorm),
          pointer<float>(s.sums),
          pointer<float>(s.state),
          temperature,
          eps);
    };
    if (p.queue) fill({*queue}, true, p.queue_padded, p.rows());
    fill(views, false, p.rows(), 0);
  });
  return s;
}

void finish_rows(
    const Device& device,
    const Problem& p,
    const Saved& saved,
    const Partial& partial,
    const int64_t* order,
    Number grad,
    double constant,
    float factor,
    Tensor& out,
    double* parts) {
  const Scaling scaling{grad, constant, 1 / factor};
  by_dtype(saved.rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(out.scalar_type() == saved.rows.scalar_type(), "expected the gradient in the rows' dtype");
    device.launch(
        finish_rows_kernel<T>,
        dim3(ceil_div(p.rows(), warps)),
        32 * warps,
        0,
        p,
        pointer<const T>(saved.rows),
        pointer<const float>(saved.rnorm),
        pointer<const float>(saved.coef),
        saved.upstream,
        pointer<const float>(saved.state),
        order,
        pointer<float>(partial.sums),
        partial.splits,
        scaling,
        pointer<T>(out),
        parts);
  });
}

}  // namespace selfsup_kernels::cuda
