// From the sums over negatives to the losses and the weights of the backward.
//
// Weights are stored relative to the reference r of the scores, as exp(logw + r): a pair's gradient is then
// exp(S - r) (w_i + w_j), one exponential for both directions. Where a weight is out of range for that (temperatures
// below 0.013) a flag sends the backward to a path that adds the logarithms. A sum that is too small to be right is
// computed again here, with a running maximum.
#include <algorithm>

#include "cuda/info_nce.h"

namespace selfsup_kernels::cuda {

namespace {

constexpr int warps = 4;

// Above exp(60) a weight belongs to a row all of whose scores are below r - 60: exp(S - r) would lose those that are
// 1e-12 of its sum.
constexpr double fast_weight = 60;
// A sum of n terms, each wrong by what is flushed to zero (1.2e-38), is right to 1e-7 above n times this.
constexpr float lost_share = 1.2e-31f;

struct TablesArguments {
  const void* stored;
  const float* sums;
  float* state;
  float *loss, *weights, *coef;
  Classes classes;
  const int64_t* order;
};

// The inner product of two stored rows, in every lane of the warp.
template <typename T>
__device__ float warp_product(const T* x, const T* y, int dim) {
  float sum = 0;
  for (int d = static_cast<int>(threadIdx.x % 32); d < dim; d += 32)
    sum += static_cast<float>(x[d]) * static_cast<float>(y[d]);
  return warp_sum(sum);
}

// Log-sum-exp over scores that come one after the other. NaN stays.
struct RunningSum {
  float top = -INFINITY;
  double total = 0;

  __device__ void add(float s) {
    const float high = s > top ? s : top;
    const float safe = fabsf(high) < INFINITY ? high : 0.0f;  // Inf - Inf would be NaN where the sum is Inf
    total = total * (top == high ? 1.0 : static_cast<double>(expf(top - safe))) + expf(s - safe);
    top = high;
  }
  __device__ double log_sum() const { return log(total) + (fabsf(top) < INFINITY ? top : 0.0f); }
};

// N of a row in column c by a running maximum; the lanes of a warp see the same numbers.
template <typename T>
__device__ double negatives_again(const Problem& p, const TablesArguments& a, int row, int c, float scale) {
  const T* stored = static_cast<const T*>(a.stored);
  const int local = row % p.padded, own = p.labels ? a.classes.begin[local] : local;
  RunningSum sum;
  for (int j = 0; j < p.limit(c); ++j) {
    if (c < p.views && (p.labels ? a.classes.begin[j] : j) == own) continue;
    const int64_t other = static_cast<int64_t>(c) * p.padded + j;
    sum.add(scale * warp_product(stored + static_cast<int64_t>(row) * p.stride, stored + other * p.stride, p.dim));
  }
  return sum.log_sum();
}

template <typename T>
__device__ double negatives(const Problem& p, const TablesArguments& a, int row, int c, Score score) {
  const float total = a.sums[static_cast<int64_t>(c) * p.rows() + row];
  // In float: a NaN is not below.
  if (total < fmaxf(p.limit(c) * lost_share, 1e-30f)) return negatives_again<T>(p, a, row, c, score.scale);
  return log(static_cast<double>(total)) + score.reference;
}

__device__ void store_weight(const Problem& p, const TablesArguments& a, int row, int c, double logw, float reference) {
  const int64_t at = static_cast<int64_t>(c) * p.rows() + row;
  const double relative = logw + reference;
  a.weights[at] = static_cast<float>(exp(relative > 80 ? 80.0 : relative));
  a.weights[static_cast<int64_t>(p.columns()) * p.rows() + at] = static_cast<float>(logw);
  if (relative > fast_weight) a.state[state_slow] = 1;  // every writer writes the same
}

// A block has `anchors` anchors of view blockIdx.y. Shared memory: for each anchor n and logw of every column, p and
// coef of every view.
template <typename T>
SK_KERNEL(32 * warps, 1)
view_tables_kernel(Problem p, TablesArguments a, int anchors) {
  const T* stored = static_cast<const T*>(a.stored);
  const int columns = p.columns(), strip = 2 * (columns + p.views);
  double* shared = reinterpret_cast<double*>(shared_memory());
  const Score score = score_reference(a.state, p.normalize);
  const int u = blockIdx.y, first = p.first + static_cast<int>(blockIdx.x) * anchors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int k = warp; k < anchors * columns; k += warps) {
    const int sample = first + k / columns, c = k % columns, row = u * p.padded + sample;
    if (!p.owns(sample)) continue;
    double* n = shared + k / columns * strip;
    double* positive = n + 2 * columns;
    const double value = p.meets(u, c) ? negatives<T>(p, a, row, c, score) : -INFINITY;
    if (lane == 0) n[c] = value;
    if (c < p.views && c != u) {
      const int64_t other = static_cast<int64_t>(c) * p.padded + sample;
      // In float: positives never go through products of fewer bits.
      const float product =
          warp_product(stored + static_cast<int64_t>(row) * p.stride, stored + other * p.stride, p.dim);
      if (lane == 0) positive[c] = static_cast<double>(product) * score.scale;
    }
  }
  __syncthreads();  // barrier of view_tables_kernel
  const ViewRule rule{p.objective, p.views, p.core, columns - p.views};
  for (int k = threadIdx.x; k < anchors; k += 32 * warps) {
    const int sample = first + k, row = u * p.padded + sample;
    if (!p.owns(sample)) continue;
    double* n = shared + k * strip;
    double *logw = n + columns, *positive = logw + columns, *coef = positive + p.views;
    positive[u] = 0;
    const double loss = anchor_loss(rule, u, n, positive, logw, coef);
    a.loss[static_cast<int64_t>(u) * p.count + sample - p.first] = static_cast<float>(loss);
    for (int c = 0; c < columns; ++c) store_weight(p, a, row, c, logw[c], score.reference);
    for (int v = 0; v < p.views; ++v) a.coef[static_cast<int64_t>(v) * p.rows() + row] = static_cast<float>(coef[v]);
  }
}

// A warp has an anchor. coef (3, rows): the pivot, the share and the factor of `class_coefficient`.
template <typename T>
SK_KERNEL(32 * warps, 1)
class_tables_kernel(Problem p, TablesArguments a) {
  const T* stored = static_cast<const T*>(a.stored);
  const int row = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / 32);
  if (row >= p.batch) return;
  const Score score = score_reference(a.state, p.normalize);
  double rest = negatives<T>(p, a, row, 0, score);
  if (p.queue) rest = log_add(rest, negatives<T>(p, a, row, 1, score));
  const int begin = a.classes.begin[row], end = a.classes.end[row];
  ClassSums sums;
  RunningSum inside;
  for (int j = begin; j < end; ++j) {
    if (j == row) continue;
    const float s =
        score.scale *
        warp_product(stored + static_cast<int64_t>(row) * p.stride, stored + static_cast<int64_t>(j) * p.stride, p.dim);
    if (p.objective == Objective::PerPositive) {
      sums.linear += log_ratio(rest, s);
      sums.share += sigmoid(rest - s);
    } else {
      sums.linear += s;
      inside.add(s);
    }
  }
  if (threadIdx.x % 32 != 0) return;
  sums.top = fabsf(inside.top) < INFINITY ? inside.top : 0.0f;
  sums.exponential = inside.total;
  const ClassAnchor anchor = class_anchor(p.objective, rest, sums, end - begin - 1);
  const int sample = static_cast<int>(a.order[row / p.user_views]);
  if (p.owns(sample))
    a.loss[static_cast<int64_t>(row % p.user_views) * p.count + sample - p.first] = static_cast<float>(anchor.loss);
  for (int c = 0; c < p.columns(); ++c) store_weight(p, a, row, c, anchor.logw, score.reference);
  double pivot = anchor.den, factor = 1;
  if (p.objective == Objective::SupconIn) {
    pivot = anchor.inside;
    factor = sigmoid(rest - anchor.inside);
  } else if (p.objective == Objective::PerPositive) {
    pivot = rest;
  }
  const bool alone = end - begin < 2;
  a.coef[row] = alone ? 0.0f : static_cast<float>(pivot);
  a.coef[p.rows() + row] = static_cast<float>(anchor.share);
  a.coef[2 * static_cast<int64_t>(p.rows()) + row] = alone ? 0.0f : static_cast<float>(factor);
}

Tables allocate(const Problem& p, const Stored& s) {
  return {
      new_tensor(s.rows, {p.user_views, p.count}, ScalarType::Float),
      new_tensor(s.rows, {2, p.columns(), p.rows()}, ScalarType::Float),
      new_tensor(s.rows, {p.labels ? 3 : p.views, p.rows()}, ScalarType::Float)};
}

TablesArguments arguments(const Stored& s, const Tables& t, Classes classes, const int64_t* order) {
  return {
      s.rows.data_ptr(),
      pointer<float>(s.sums),
      pointer<float>(s.state),
      pointer<float>(t.loss),
      pointer<float>(t.weights),
      pointer<float>(t.coef),
      classes,
      order};
}

}  // namespace

Tables view_tables(const Device& device, const Problem& p, const Stored& stored) {
  Tables t = allocate(p, stored);
  const int strip = 2 * (p.columns() + p.views) * static_cast<int>(sizeof(double));
  // As many anchors as have threads for their arithmetic, if there is memory for them; fewer where that would leave
  // multiprocessors idle, for a block takes its anchors' columns one after the other.
  const int even = static_cast<int>(ceil_div(int64_t(p.count) * p.views, 4 * device.processors()));
  const int anchors = std::max(1, std::min({32 * warps / 2, device.shared_limit() / strip, even}));
  by_dtype(stored.rows.scalar_type(), [&](auto zero) {
    device.launch(
        view_tables_kernel<decltype(zero)>,
        dim3(ceil_div(p.count, anchors), p.views),
        32 * warps,
        static_cast<size_t>(anchors) * strip,
        p,
        arguments(stored, t, {}, nullptr),
        anchors);
  });
  return t;
}

Tables class_tables(
    const Device& device, const Problem& p, const Stored& stored, Classes classes, const int64_t* order) {
  Tables t = allocate(p, stored);
  by_dtype(stored.rows.scalar_type(), [&](auto zero) {
    device.launch(
        class_tables_kernel<decltype(zero)>,
        dim3(ceil_div(p.batch, warps)),
        32 * warps,
        0,
        p,
        arguments(stored, t, classes, order));
  });
  return t;
}

}  // namespace selfsup_kernels::cuda
