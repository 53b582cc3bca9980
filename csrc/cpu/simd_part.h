// Rows whose length is not a multiple of the vector length. Included by kernels_impl.h; see simd.h for the rules.
#pragma once

#include "cpu/simd.h"

namespace selfsup_kernels::SK_ARCH {

// A vector whose first n lanes are p[0..n), the rest `fill`.
template <typename T>
inline Vec<T> load_part(const T* p, int64_t n, T fill) {
  T lane[lanes<T>];
  for (T& x : lane) x = fill;
  std::memcpy(lane, p, n * sizeof(T));
  return load<T>(lane);
}

template <typename T>
inline void store_part(T* p, int64_t n, Vec<T> v) {
  std::memcpy(p, &v, n * sizeof(T));
}

template <typename T>
constexpr T infinity = static_cast<T>(__builtin_inf());

// row[j...] <- f(vector of row[j...], at) over a row; at(p) loads p[j...]. The last vectors are padded with zeros.
template <typename T, typename F>
inline void map_row(T* row, int64_t n, F f) {
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store<T>(row + j, f(load<T>(row + j), [j](const T* p) { return load<T>(p + j); }));
  if (j < n) {
    int64_t rest = n - j;
    store_part<T>(row + j, rest, f(load_part<T>(row + j, rest, 0), [j, rest](const T* p) {
                    return load_part<T>(p + j, rest, 0);
                  }));
  }
}

}  // namespace selfsup_kernels::SK_ARCH
