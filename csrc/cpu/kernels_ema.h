// The moving average on a range of memory. Included by kernels_impl.h; see simd.h for the rules.
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

// Loads the source as a vector of the arithmetic type A, which is double for float64 targets only.
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

template <int write, int count, typename T>
inline void prefetch(const T* p) {
  for (int k = 0; k < count; k += 64 / sizeof(T)) __builtin_prefetch(p + k, write);
}

// Averages n elements; `save(p, v, k)` stores a vector that begins at element k.
template <bool from_t, typename A, typename Target, typename Source, typename Save>
inline void ema_elements(Target* t, const Source* s, int64_t n, A w, Save save) {
  constexpr int W = lanes<A>, several = 4;
  constexpr int64_t ahead = 256;  // in elements; hardware prefetchers cannot keep up with two streams per thread
  auto one = [&](Target* t, const Source* s, int64_t k) {
    save(t, average<Vec<A>, A>(load_as<A>(t), load_source<A>(s), w), k);
  };
  int64_t j = 0;
  for (; j + several * W <= n; j += several * W) {
    prefetch<1, several * W>(t + j + ahead);
    prefetch<0, several * W>(s + j + ahead);
    Vec<A> step[several], zero{};
    for (int u = 0; u < several; ++u) {
      step[u] = lerp_from<from_t, Vec<A>, A>(load_as<A>(t + j + u * W), load_source<A>(s + j + u * W), w);
      zero += step[u] * A(0);
    }
    if (any<A>(zero != A(0)))  // one test for all vectors, as results are rarely not finite
      for (int u = 0; u < several; ++u) one(t + j + u * W, s + j + u * W, j + u * W);
    else
      for (int u = 0; u < several; ++u) save(t + j + u * W, step[u], j + u * W);
  }
  for (; j + W <= n; j += W) one(t + j, s + j, j);
  if (j < n) {
    Target old[W] = {};
    Source now[W] = {};
    std::memcpy(old, t + j, (n - j) * sizeof(Target));
    std::memcpy(now, s + j, (n - j) * sizeof(Source));
    one(old, now, j);
    std::memcpy(t + j, old, (n - j) * sizeof(Target));
  }
}

template <typename Target, typename Source>
void ema_span(
    void* target, const void* source, int64_t n, double weight, const int64_t* seed, uint32_t stream, uint64_t offset) {
  using A = std::conditional_t<sizeof(Target) == 8, double, float>;
  Target* t = static_cast<Target*>(target);
  const Source* s = static_cast<const Source*>(source);
  const A w = static_cast<A>(weight);
  auto update = [&](auto save) {
    if (w < A(0.5))
      ema_elements<true, A>(t, s, n, w, save);
    else
      ema_elements<false, A>(t, s, n, w, save);
  };
  if constexpr (sizeof(Target) == 2) {
    if (seed)
      return update(
          [&](Target* p, Vec<A> v, int64_t k) { store_stochastically(p, v, random_bits(*seed, stream, offset + k)); });
  }
  update([](Target* p, Vec<A> v, int64_t) { store_as(p, v); });
}

}  // namespace selfsup_kernels::SK_ARCH
