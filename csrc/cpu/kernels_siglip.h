// The kernel on tiles of inner products for the sigmoid loss. Included by kernels_impl.h; see simd.h for the rules.
#pragma once

#include "cpu/simd_part.h"

namespace selfsup_kernels::SK_ARCH {

// The sums of one row. `Sums`: only the loss.
template <typename T, bool Sums>
struct SigmoidRow {
  Vec<T> loss{}, slope{}, along{};

  // Returns sigmoid(x) for x = scale * s + bias and adds to the sums. With Masked, an s of -Inf counts 0.
  template <bool Masked>
  inline Vec<T> add(Vec<T> s, T scale, T bias) {
    Vec<T> x = s * scale + bias;
    const IntVec<T> above = (IntVec<T>)(x > T(0));
    Vec<T> y = exp(select<T>(above, -x, x));
    Vec<T> soft = log_plus_one(y) + select<T>(above, x, Vec<T>{});
    Vec<T> sigmoid{};
    if constexpr (!Sums) sigmoid = select<T>(above, broadcast<T>(1), y) / (y + T(1));
    if constexpr (Masked) {
      const IntVec<T> valid = (IntVec<T>)(s != -infinity<T>);
      s = select<T>(valid, s, Vec<T>{});
      soft = select<T>(valid, soft, Vec<T>{});
      sigmoid = select<T>(valid, sigmoid, Vec<T>{});
    }
    loss += soft;
    if constexpr (!Sums) {
      slope += sigmoid;
      along += sigmoid * s;
    }
    return sigmoid;
  }
};

template <typename T, bool Masked, bool Sums>
inline void sigmoid_row(T* s, int64_t cols, T scale, T bias, T weight, double* sums) {
  constexpr int W = lanes<T>;
  SigmoidRow<T, Sums> row;
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    Vec<T> g = row.template add<Masked>(load<T>(s + j), scale, bias);
    if constexpr (!Sums) store<T>(s + j, g * weight);
  }
  if (j < cols) {
    Vec<T> g = row.template add<true>(load_part<T>(s + j, cols - j, -infinity<T>), scale, bias);
    if constexpr (!Sums) store_part<T>(s + j, cols - j, g * weight);
  }
  sums[0] += sum<T>(row.loss);
  if constexpr (!Sums) {
    sums[1] += sum<T>(row.slope);
    sums[2] += sum<T>(row.along);
  }
}

// turned (cols x rows) <- the transpose of s (rows x cols), for the rows [from, from + W).
template <typename T>
inline void turn_rows(const T* s, int64_t from, int64_t rows, int64_t cols, T* turned) {
  constexpr int W = lanes<T>;
  const int64_t whole = from + W <= rows ? cols / W * W : 0;
  for (int64_t j = 0; j < whole; j += W) {
    Vec<T> square[W];
    for (int r = 0; r < W; ++r) square[r] = load<T>(s + (from + r) * cols + j);
    transpose<T>(square);
    for (int c = 0; c < W; ++c) store<T>(turned + (j + c) * rows + from, square[c]);
  }
  const int64_t end = from + W < rows ? from + W : rows;
  for (int64_t i = from; i < end; ++i)
    for (int64_t j = whole; j < cols; ++j) turned[j * rows + i] = s[i * cols + j];
}

template <typename T>
void sigmoid_pairs(
    T* s, int64_t rows, int64_t cols, T scale, T bias, bool masked, const T* row_weight, T* turned, double* sums) {
  // A few rows at a time, which are still in the L1 cache when they are turned.
  for (int64_t from = 0; from < rows; from += lanes<T>) {
    for (int64_t i = from; i < rows && i < from + lanes<T>; ++i) {
      T* row = s + i * cols;
      double* of_row = sums + 3 * i;
      if (!row_weight)
        sigmoid_row<T, true, true>(row, cols, scale, bias, T(1), of_row);
      else if (masked)
        sigmoid_row<T, true, false>(row, cols, scale, bias, row_weight[i], of_row);
      else
        sigmoid_row<T, false, false>(row, cols, scale, bias, row_weight[i], of_row);
    }
    if (turned) turn_rows<T>(s, from, rows, cols, turned);
  }
}

}  // namespace selfsup_kernels::SK_ARCH
