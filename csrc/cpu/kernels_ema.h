// The moving average on a stretch of memory. Included by kernels_impl.h; see simd.h for the rules.
#pragma once

#include "common/ema.h"
#include "cpu/simd_half.h"
#include "cpu/simd_part.h"

namespace selfsup_kernels::SK_ARCH {

inline FloatBits random_bits(int64_t seed, uint32_t stream, uint64_t element) {
  FloatBits index{};
  for (int k = 0; k < lanes<float>; ++k) index[k] = static_cast<uint32_t>(element + k);
  return selfsup_kernels::random_bits<FloatBits>(random_stream(seed, stream, element), index);
}

template <typename Target, typename A>
inline void store_target(Target* p, Vec<A> v, const int64_t* seed, uint32_t stream, uint64_t element) {
  if constexpr (sizeof(Target) == 2) {
    if (seed) return store_stochastically(p, v, random_bits(*seed, stream, element));
  }
  store_as(p, v);
}

// The source as a vector of the arithmetic type; a float64 on either side makes that double.
template <typename A, typename S>
inline Vec<A> load_source(const S* p) {
  if constexpr (sizeof(A) == sizeof(S) || (sizeof(A) == 4 && sizeof(S) == 2)) {
    return load_as<A>(p);
  } else if constexpr (sizeof(S) == 8) {
    Vec<A> v;
    for (int k = 0; k < lanes<A>; ++k) v[k] = static_cast<A>(p[k]);
    return v;
  } else {
    float wide[lanes<float>];
    if constexpr (sizeof(S) == 4) {
      std::memcpy(wide, p, lanes<A> * sizeof(float));
    } else {
      S part[lanes<float>] = {};
      std::memcpy(part, p, lanes<A> * sizeof(S));
      store<float>(wide, load_as<float>(part));
    }
    Vec<A> v;
    for (int k = 0; k < lanes<A>; ++k) v[k] = wide[k];
    return v;
  }
}

template <typename Target, typename Source>
void ema_span(
    void* target, const void* source, int64_t n, double weight, const int64_t* seed, uint32_t stream, uint64_t offset) {
  using A = std::conditional_t<sizeof(Target) == 8, double, float>;
  constexpr int W = lanes<A>;
  Target* t = static_cast<Target*>(target);
  const Source* s = static_cast<const Source*>(source);
  A w = static_cast<A>(weight);
  constexpr int64_t ahead = 256;  // elements: two streams per thread are more than the hardware's prefetchers fill
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    __builtin_prefetch(t + j + ahead, 1);
    __builtin_prefetch(s + j + ahead, 0);
    store_target<Target, A>(
        t + j, lerp<Vec<A>, A>(load_as<A>(t + j), load_source<A>(s + j), w), seed, stream, offset + j);
  }
  if (j < n) {
    Target old[W] = {};
    Source now[W] = {};
    std::memcpy(old, t + j, (n - j) * sizeof(Target));
    std::memcpy(now, s + j, (n - j) * sizeof(Source));
    store_target<Target, A>(old, lerp<Vec<A>, A>(load_as<A>(old), load_source<A>(now), w), seed, stream, offset + j);
    std::memcpy(t + j, old, (n - j) * sizeof(Target));
  }
}

}  // namespace selfsup_kernels::SK_ARCH
