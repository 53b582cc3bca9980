// The vector kernels, one table for each instruction set; dispatch.cpp picks one at run time.
//
// T is the arithmetic type, float or double. A kernel works on one tile or one row, in one thread.
#pragma once

#include <cstdint>

namespace selfsup_kernels {

// The storage types, in the order of the EMA kernels' table.
enum class Storage : int { Float = 0, Double = 1, BFloat16 = 2, Float16 = 3 };

// The contribution of an anchor with labels to the gradient of a pair in its class; x is the pair's score.
//   Difference: weight * exp(x - ref) - share    Exponential: -weight * exp(x - ref)
//   Sigmoid: -share * sigmoid(ref - x)           Constant: -share
enum class LabelForm : int { Difference = 0, Exponential = 1, Sigmoid = 2, Constant = 3 };

template <typename T>
struct LabelRow {
  const T *weight, *share, *ref;
  const T* less;  // subtracted from the score where the row is the other one of the pair
};

template <typename T>
struct Kernels {
  // ---- InfoNCE, on a tile of inner products S (rows x cols, leading dimension ld); x = scale * S ----

  // row_sum[i] += sum_j exp(x_ij - ref), col_sum[j] += sum_i of the same (unless null). An entry of -Inf adds 0.
  // With factors (unless null) row_sum takes col_factor[j]^2 times the exponentials, col_sum row_factor[i]^2 times: the
  // square may be too small for T where its product with an exponential is not.
  void (*exp_sums)(
      const T* s,
      int64_t ld,
      int64_t rows,
      int64_t cols,
      T scale,
      T ref,
      const T* row_factor,
      const T* col_factor,
      double* row_sum,
      T* col_sum);

  // S <- exp(x - ref) * (row_weight[i] + col_weight[j]), with factors (unless null) exp(x - ref) * (row_weight[i] *
  // col_factor[j]^2 + col_weight[j] * row_factor[i]^2); `turned` (unless null) <- its transpose.
  void (*exp_gradient)(
      T* s,
      int64_t ld,
      T* turned,
      int64_t turned_ld,
      int64_t rows,
      int64_t cols,
      T scale,
      T ref,
      const T* row_weight,
      const T* col_weight,
      const T* row_factor,
      const T* col_factor);

  // S <- exp(x - row_ref[i]) * row_weight[i].
  void (*exp_rows)(T* s, int64_t ld, int64_t rows, int64_t cols, T scale, const T* row_ref, const T* row_weight);

  // The largest number in the row, -Inf if there is none. Ignores NaN, which the sums that follow propagate.
  T (*row_max)(const T* row, int64_t n);

  // sums[0] += sum x, sums[1] += sum exp(x - ref).
  void (*label_sums)(const T* row, int64_t n, T scale, T ref, double* sums);

  // sums[0] += sum softplus(negatives - x), sums[1] += sum sigmoid(negatives - x).
  void (*label_softplus)(const T* row, int64_t n, T scale, T negatives, double* sums);

  // S <- c_ij + c_ji, the derivatives of a pair of one class with either row as the anchor.
  void (*label_gradient)(
      T* s, int64_t ld, int64_t rows, int64_t cols, T scale, LabelForm form, LabelRow<T> row, LabelRow<T> col);

  // ---- SigLIP, on a contiguous tile of inner products S (rows x cols); x = scale * S + bias ----

  // sums[3 i] += sum_j softplus(x_ij) and, with row_weight, sums[3 i + 1] += sum_j sigmoid(x_ij), sums[3 i + 2] +=
  // sum_j sigmoid(x_ij) S_ij, S <- row_weight[i] sigmoid(x); `turned` (unless null) <- its transpose. With `masked` an
  // S of -Inf counts 0.
  void (*sigmoid_pairs)(
      T* s, int64_t rows, int64_t cols, T scale, T bias, bool masked, const T* row_weight, T* turned, double* sums);

  // ---- rows of d features ----

  // z <- h / max(|h|, eps); returns 1 / max(|h|, eps), negated if |h| < eps.
  T (*unit_row)(const T* h, int64_t d, double eps, T* z);
  T (*dot)(const T* a, const T* b, int64_t d);
  // y <- y + a x.
  void (*add_scaled)(T* y, const T* x, T a, int64_t d);
  // dz <- scale * dz; then, if rnorm != 0, back through the normalisation: (dz - z <z, dz>) |rnorm|, without the
  // projection if rnorm < 0. Returns <z, scale dz>.
  T (*finish_row)(const T* z, T* dz, int64_t d, T scale, T rnorm);

  // ---- BYOL, one sample: p[v], t[v] are its rows in the V views ----

  // Writes 1/|p|, 1/|t| (negated below eps) and the anchors' sums of cosines. `sum` is scratch of d numbers.
  void (*byol_forward)(
      const T* const* p, const T* const* t, int64_t views, int64_t d, double eps, T* sum, T* rp, T* rt, T* cosines);
  // dp[v] <- weight[v] * |rp| * (opposite - unit p * cosine).
  void (*byol_backward)(
      const T* const* p,
      const T* const* t,
      int64_t views,
      int64_t d,
      const T* rp,
      const T* rt,
      const T* cosines,
      const T* weight,
      T* sum,
      T* const* dp);

  // ---- conversion between storage and arithmetic ----
  void (*widen)(const void* from, Storage storage, int64_t n, T* to);
  // saturate: a value beyond float16's range becomes float16's largest number instead of Inf.
  void (*narrow)(const T* from, int64_t n, bool saturate, void* to, Storage storage);
};

// target <- target + weight * (source - target) on n elements, computed in float, or double for double targets.
// With a seed, 16-bit targets are rounded stochastically; `stream` and `offset` identify the tensor and first element.
using EmaSpan = void (*)(
    void* target, const void* source, int64_t n, double weight, const int64_t* seed, uint32_t stream, uint64_t offset);

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  EmaSpan ema[4][4];  // [target][source]
};

// The table for this machine, or for SELFSUP_KERNELS_CPU_CAPABILITY = default | avx2 | avx512 if the machine has that.
const KernelTable& kernel_table();

template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return kernel_table().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return kernel_table().f64;
}

extern const KernelTable kernels_default;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;

}  // namespace selfsup_kernels
