// The moving average and its random bits. V and Bits are a scalar (one GPU thread) or a SIMD vector (CPU).
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace selfsup_kernels {

// t + w (s - t), computed from the nearer end, so that w = 0 gives t and w = 1 gives s exactly (as in torch.lerp).
template <bool from_t, typename V, typename A>
SK_INLINE V lerp_from(V t, V s, A w) {
  return from_t ? t + (s - t) * w : s - (s - t) * (A(1) - w);
}
template <typename V, typename A>
SK_INLINE V lerp(V t, V s, A w) {
  return w < A(0.5) ? lerp_from<true, V, A>(t, s, w) : lerp_from<false, V, A>(t, s, w);
}

// The moving average (1 - w) t + w s. Returns `step` = lerp(t, s, w) if that is finite. If an end is infinite or s - t
// overflows, returns the sum above, in which an infinity of weight 0 is ignored. NaN in either end gives NaN.
template <typename V, typename A>
SK_INLINE V average(V t, V s, A w, V step) {
  const bool from_t = w < A(0.5);
  const V near = from_t ? t : s, far = from_t ? s : t;
  const A part = from_t ? w : A(1) - w;
  const V sum = part == A(0) ? (far == far ? near : far) : near * (A(1) - part) + far * part;
  return step - step == A(0) ? step : sum;
}
template <typename V, typename A>
SK_INLINE V average(V t, V s, A w) {
  return average<V, A>(t, s, w, lerp<V, A>(t, s, w));
}

// An integer hash (C. Wellons' "lowbias32" construction).
template <typename Bits>
SK_INLINE Bits hash(Bits x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  return x ^ (x >> 15);
}

// The inputs of an element's random bits other than its index modulo 2^32.
struct RandomStream {
  uint32_t key, high;
};

// `stream` is the tensor's index in its list, `element` the index of an element, of which only the upper 32 bits count.
SK_INLINE RandomStream random_stream(int64_t seed, uint32_t stream, uint64_t element) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {
      stream * 0x9e3779b9u ^ static_cast<uint32_t>(bits),
      hash<uint32_t>(static_cast<uint32_t>(element >> 32) * 0x85ebca6bu ^ static_cast<uint32_t>(bits >> 32))};
}

// 32 random bits for each element index.
template <typename Bits>
SK_INLINE Bits random_bits(RandomStream stream, Bits element) {
  return hash<Bits>(hash<Bits>(element + stream.key) + stream.high);
}

}  // namespace selfsup_kernels
