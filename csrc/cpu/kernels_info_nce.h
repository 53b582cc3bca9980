// The kernels on tiles of inner products, for InfoNCE. Included by kernels_impl.h; see simd.h for the rules.
#pragma once

#include "cpu/simd_part.h"

namespace selfsup_kernels::SK_ARCH {

template <typename T, int R, bool Factors>
inline void exp_sums_rows(
    const T* s,
    int64_t ld,
    int64_t cols,
    T scale,
    T ref,
    const T* row_factor,
    const T* col_factor,
    double* row_sum,
    T* col_sum) {
  constexpr int W = lanes<T>;
  Vec<T> total[R] = {};
  auto add = [&](int r, Vec<T> e, Vec<T> factor, Vec<T>& column) {
    total[r] += Factors ? e * factor * factor : e;
    column += Factors ? e * row_factor[r] * row_factor[r] : e;
  };
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    Vec<T> column{};
    for (int r = 0; r < R; ++r) {
      Vec<T> e = exp(load<T>(s + r * ld + j) * scale - ref);
      add(r, e, Factors ? load<T>(col_factor + j) : e, column);
    }
    if (col_sum) store<T>(col_sum + j, load<T>(col_sum + j) + column);
  }
  if (j < cols) {
    Vec<T> column{};
    for (int r = 0; r < R; ++r) {
      Vec<T> e = exp(load_part<T>(s + r * ld + j, cols - j, -infinity<T>) * scale - ref);
      add(r, e, Factors ? load_part<T>(col_factor + j, cols - j, 0) : e, column);
    }
    if (col_sum) store_part<T>(col_sum + j, cols - j, load_part<T>(col_sum + j, cols - j, 0) + column);
  }
  for (int r = 0; r < R; ++r) row_sum[r] += sum<T>(total[r]);
}

template <typename T>
void exp_sums(
    const T* s,
    int64_t ld,
    int64_t rows,
    int64_t cols,
    T scale,
    T ref,
    const T* row_factor,
    const T* col_factor,
    double* row_sum,
    T* col_sum) {
  // Four rows share one pass over the column sums.
  auto some = [=](auto rows_of, int64_t i) {
    rows_of(s + i * ld, ld, cols, scale, ref, col_factor ? row_factor + i : nullptr, col_factor, row_sum + i, col_sum);
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) some(col_factor ? exp_sums_rows<T, 4, true> : exp_sums_rows<T, 4, false>, i);
  for (; i < rows; ++i) some(col_factor ? exp_sums_rows<T, 1, true> : exp_sums_rows<T, 1, false>, i);
}

template <typename T, bool Factors>
void exp_gradient_of(
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
    const T* col_factor) {
  constexpr int W = lanes<T>;
  auto both = [=](int64_t i, Vec<T> columns, Vec<T> factors) {
    if constexpr (Factors) return columns * row_factor[i] * row_factor[i] + factors * row_weight[i] * factors;
    return columns + row_weight[i];
  };
  auto one_row = [=](int64_t i, int64_t from) {
    const T *columns = col_weight + from, *factors = Factors ? col_factor + from : columns;
    map_row<T>(s + i * ld + from, cols - from, [=](Vec<T> x, auto at) {
      return exp(x * scale - ref) * both(i, at(columns), at(factors));
    });
  };
  if (!turned) {
    for (int64_t i = 0; i < rows; ++i) one_row(i, 0);
    return;
  }
  // A W x W square passes through the registers once and gives both results.
  const int64_t whole_rows = rows / W * W, whole_cols = cols / W * W;
  for (int64_t i = 0; i < whole_rows; i += W) {
    for (int64_t j = 0; j < whole_cols; j += W) {
      Vec<T> square[W], columns = load<T>(col_weight + j), factors = Factors ? load<T>(col_factor + j) : columns;
      for (int r = 0; r < W; ++r) {
        square[r] = exp(load<T>(s + (i + r) * ld + j) * scale - ref) * both(i + r, columns, factors);
        store<T>(s + (i + r) * ld + j, square[r]);
      }
      transpose<T>(square);
      for (int c = 0; c < W; ++c) store<T>(turned + (j + c) * turned_ld + i, square[c]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t from = i < whole_rows ? whole_cols : 0;
    if (from == cols) continue;
    one_row(i, from);
    for (int64_t j = from; j < cols; ++j) turned[j * turned_ld + i] = s[i * ld + j];
  }
}

template <typename T>
void exp_gradient(
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
    const T* col_factor) {
  auto of = col_factor ? exp_gradient_of<T, true> : exp_gradient_of<T, false>;
  of(s, ld, turned, turned_ld, rows, cols, scale, ref, row_weight, col_weight, row_factor, col_factor);
}

template <typename T>
void exp_rows(T* s, int64_t ld, int64_t rows, int64_t cols, T scale, const T* row_ref, const T* row_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    T weight = row_weight[i], ref = row_ref[i];
    map_row<T>(s + i * ld, cols, [=](Vec<T> x, auto) { return exp(x * scale - ref) * weight; });
  }
}

template <typename T>
T row_max(const T* row, int64_t n) {
  constexpr int W = lanes<T>;
  Vec<T> top = broadcast<T>(-infinity<T>);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    Vec<T> x = load<T>(row + j);
    top = select<T>(x > top, x, top);
  }
  T lane[W], result = -infinity<T>;
  store<T>(lane, top);
  for (T x : lane) result = x > result ? x : result;
  for (; j < n; ++j) result = row[j] > result ? row[j] : result;
  return result;
}

// Calls f(vector of the row, mask of its valid lanes) over a row.
template <typename T, typename F>
inline void visit_row(const T* row, int64_t n, F f) {
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(load<T>(row + j), ~IntVec<T>{});
  if (j < n) {
    T one[W] = {};
    for (int64_t k = 0; k < n - j; ++k) one[k] = 1;
    f(load_part<T>(row + j, n - j, 0), (IntVec<T>)(load<T>(one) > T(0)));
  }
}

template <typename T>
void label_sums(const T* row, int64_t n, T scale, T ref, double* sums) {
  Vec<T> linear{}, exponential{};
  visit_row<T>(row, n, [&](Vec<T> s, IntVec<T> valid) {
    Vec<T> x = s * scale;
    linear += select<T>(valid, x, Vec<T>{});
    exponential += select<T>(valid, exp(x - ref), Vec<T>{});
  });
  sums[0] += sum<T>(linear);
  sums[1] += sum<T>(exponential);
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  Vec<T> y = exp(select<T>((IntVec<T>)(x > T(0)), -x, x));
  return select<T>((IntVec<T>)(x > T(0)), broadcast<T>(1), y) / (y + T(1));
}

template <typename T>
void label_softplus(const T* row, int64_t n, T scale, T negatives, double* sums) {
  Vec<T> soft{}, share{};
  visit_row<T>(row, n, [&](Vec<T> s, IntVec<T> valid) {
    Vec<T> x = s * scale;
    Vec<T> d = negatives - select<T>((IntVec<T>)(x == infinity<T>), x - x, x);
    IntVec<T> above = (IntVec<T>)(d > T(0));
    Vec<T> y = exp(select<T>(above, -d, d));
    Vec<T> softplus = log_plus_one(y) + select<T>(above, d, Vec<T>{});
    soft += select<T>(valid, softplus, Vec<T>{});
    share += select<T>(valid, sigmoid<T>(d), Vec<T>{});
  });
  sums[0] += sum<T>(soft);
  sums[1] += sum<T>(share);
}

template <typename T, LabelForm O>
inline Vec<T> label_coefficient(Vec<T> x, Vec<T> weight, Vec<T> share, Vec<T> ref) {
  if constexpr (O == LabelForm::Difference) return weight * exp(x - ref) - share;
  if constexpr (O == LabelForm::Exponential) return -weight * exp(x - ref);
  if constexpr (O == LabelForm::Sigmoid) return -share * sigmoid<T>(ref - x);
  return -share;
}

template <typename T, LabelForm O>
void label_gradient_of(T* s, int64_t ld, int64_t rows, int64_t cols, T scale, LabelRow<T> row, LabelRow<T> col) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> weight = broadcast<T>(row.weight[i]), share = broadcast<T>(row.share[i]), ref = broadcast<T>(row.ref[i]);
    const T less = row.less[i];
    map_row<T>(s + i * ld, cols, [=](Vec<T> x, auto at) {
      x *= scale;
      return label_coefficient<T, O>(x - at(col.less), weight, share, ref) +
             label_coefficient<T, O>(x - less, at(col.weight), at(col.share), at(col.ref));
    });
  }
}

template <typename T>
void label_gradient(
    T* s, int64_t ld, int64_t rows, int64_t cols, T scale, LabelForm form, LabelRow<T> row, LabelRow<T> col) {
  using O = LabelForm;
  switch (form) {
    case O::Difference:
      return label_gradient_of<T, O::Difference>(s, ld, rows, cols, scale, row, col);
    case O::Exponential:
      return label_gradient_of<T, O::Exponential>(s, ld, rows, cols, scale, row, col);
    case O::Sigmoid:
      return label_gradient_of<T, O::Sigmoid>(s, ld, rows, cols, scale, row, col);
    case O::Constant:
      return label_gradient_of<T, O::Constant>(s, ld, rows, cols, scale, row, col);
  }
}

}  // namespace selfsup_kernels::SK_ARCH
