// Vectors of one instruction set, in GCC/Clang vector extensions.
//
// Included once by each kernels_<capability>.cpp, after a target pragma for the instruction set and definitions of
// SK_ARCH (a namespace) and SK_VECTOR_BYTES. All code here must be in that namespace, and no standard header may be
// included below the pragma: else the linker could keep the AVX-512 copy of an inline function for the whole library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace selfsup_kernels::SK_ARCH {

template <typename T>
constexpr int lanes = SK_VECTOR_BYTES / sizeof(T);

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using IntVec = typename VecOf<T>::integer;

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
inline Vec<T> select(IntVec<T> mask, Vec<T> yes, Vec<T> no) {
  return (Vec<T>)((mask & (IntVec<T>)yes) | (~mask & (IntVec<T>)no));
}

// True if the mask is set in any lane.
template <typename T>
inline bool any(IntVec<T> mask) {
#if defined(SK_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(SK_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  IntVec<double> words = (IntVec<double>)mask;
  int64_t all = 0;
  for (int k = 0; k < lanes<double>; ++k) all |= words[k];
  return all != 0;
#endif
}

// One stage of a transpose: interleaves the even runs of `Run` lanes of a and b, or (Upper) their odd runs.
template <typename T, int Run, bool Upper>
inline Vec<T> exchange(Vec<T> a, Vec<T> b) {
  IntVec<T> index{};
  for (int k = 0; k < lanes<T>; ++k) {
    const bool odd = (k / Run) % 2;
    index[k] = Upper ? (odd ? lanes<T> + k : k + Run) : (odd ? lanes<T> + k - Run : k);
  }
#if defined(__clang__)
  Vec<T> result{};
  for (int k = 0; k < lanes<T>; ++k) result[k] = index[k] < lanes<T> ? a[index[k]] : b[index[k] - lanes<T>];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Transposes a square of lanes<T> vectors in place, in log2(lanes<T>) stages with runs of half the length each.
template <typename T, int Run = lanes<T> / 2>
inline void transpose(Vec<T>* rows) {
  if constexpr (Run > 0) {
    for (int i = 0; i < lanes<T>; ++i) {
      if ((i / Run) % 2) continue;
      Vec<T> a = rows[i], b = rows[i + Run];
      rows[i] = exchange<T, Run, false>(a, b);
      rows[i + Run] = exchange<T, Run, true>(a, b);
    }
    transpose<T, Run / 2>(rows);
  }
}

// Sums the lanes in a fixed order, so that the result does not depend on how rows are distributed over threads.
template <typename T, int Width = lanes<T> / 2>
inline T sum(Vec<T> v) {
#if defined(__clang__)
  T lane[lanes<T>];
  store<T>(lane, v);
  for (int width = Width; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#else  // within the registers, not through memory
  if constexpr (Width == 0) {
    return v[0];
  } else {
    IntVec<T> upper{};
    for (int k = 0; k < lanes<T>; ++k) upper[k] = (k + Width) % lanes<T>;
    return sum<T, Width / 2>(v + __builtin_shuffle(v, upper));
  }
#endif
}

// exp with an error below 2 ulp where the result is normal. Smaller results are 0, larger ones Inf; NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  typedef Vec<float> V;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  V shifted = x * 1.44269504088896341f + magic;
  V n = shifted - magic;
  V f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  V p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + (f + 1.0f);
  IntVec<float> power = ((IntVec<float>)shifted + 127) << 23;  // shifts the magic's own bits out
  V y = p * (V)power;
  y = select<float>(x < -87.33f, V{}, y);
  return select<float>(x > 88.37f, broadcast<float>(__builtin_inff()), y);
}

inline Vec<double> exp(Vec<double> x) {
  typedef Vec<double> V;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  V shifted = x * 1.4426950408889634074 + magic;
  V n = shifted - magic;
  V f = x - n * 6.93147180369123816490e-01;
  f = f - n * 1.90821492927058770002e-10;
  V p = f * (1.0 / 6227020800.0) + 1.0 / 479001600.0;  // Taylor to f^13: below 1e-17 on |f| <= ln(2)/2
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * (f * f) + (f + 1.0);
  IntVec<double> power = ((IntVec<double>)shifted + 1023) << 52;
  V y = p * (V)power;
  y = select<double>(x < -708.3, V{}, y);
  return select<double>(x > 709.0, broadcast<double>(__builtin_inf()), y);
}

// log of a positive normal number; 0 gives -Inf. The reduced argument is in [sqrt(1/2), sqrt(2)).
inline Vec<float> log(Vec<float> x) {
  typedef Vec<float> V;
  IntVec<float> bits = (IntVec<float>)x - 0x3f3504f3;  // sqrt(1/2)
  V n = __builtin_convertvector(bits >> 23, V);
  V m = (V)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  V square = m * m;
  V y = p * m * square + n * -2.12194440e-4f - 0.5f * square;
  y = m + y + n * 0.693359375f;
  return select<float>(x == 0.0f, broadcast<float>(-__builtin_inff()), y);
}

inline Vec<double> log(Vec<double> x) {
  // Lane by lane: float64 is for checking, not for speed.
  double lane[lanes<double>];
  store<double>(lane, x);
  for (double& v : lane) v = __builtin_log(v);
  return load<double>(lane);
}

// log(1 + y) for 0 <= y <= 1, with a small relative error for small y too.
inline Vec<float> log_plus_one(Vec<float> y) {
  // Chebyshev interpolation of log(1 + y) / y, whose error is below 6e-9.
  Vec<float> p = y * -3.1760570085e-3f + 1.9542527214e-2f;
  p = p * y - 5.6373612738e-2f;
  p = p * y + 1.0543623785e-1f;
  p = p * y - 1.5269667068e-1f;
  p = p * y + 1.9663274255e-1f;
  p = p * y - 2.4951616262e-1f;
  p = p * y + 3.3329710499e-1f;
  p = p * y - 4.9999892648e-1f;
  p = p * y + 9.9999999466e-1f;
  return p * y;
}

inline Vec<double> log_plus_one(Vec<double> y) {
  // The division cancels the rounding error of 1 + y.
  Vec<double> u = y + 1.0, rounded = u - 1.0;
  IntVec<double> tiny = (IntVec<double>)(rounded == 0.0);
  return select<double>(tiny, y, log(u) * y / select<double>(tiny, u, rounded));
}

}  // namespace selfsup_kernels::SK_ARCH
