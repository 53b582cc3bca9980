// The moving average and its random bits. V and Bits are a number or a vector of numbers: the same arithmetic for the
// CPU's vectors and for one thread of a GPU.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace selfsup_kernels {

// t + w (s - t), from whichever end is nearer, so that w = 0 and w = 1 give t and s exactly (as torch.lerp does).
template <bool from_t, typename V, typename A>
SK_INLINE V lerp_from(V t, V s, A w) {
  return from_t ? t + (s - t) * w : s - (s - t) * (A(1) - w);
}
template <typename V, typename A>
SK_INLINE V lerp(V t, V s, A w) {
  return w < A(0.5) ? lerp_from<true, V, A>(t, s, w) : lerp_from<false, V, A>(t, s, w);
}

// The moving average (1 - w) t + w s: `step`, which is lerp(t, s, w), unless that is not finite because an end is
// infinite or the difference overflows. Then it is the sum as it stands here, in which an infinity of weight 0 does not
// count. NaN in either end is NaN.
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

// What the random bits of an element depend on, besides its number modulo 2^32.
struct RandomStream {
  uint32_t key, high;
};

// `stream` is the tensor's place in its list, `element` the number of any of the 2^32 elements that share the upper
// half.
SK_INLINE RandomStream random_stream(int64_t seed, uint32_t stream, uint64_t element) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {
      stream * 0x9e3779b9u ^ static_cast<uint32_t>(bits),
      hash<uint32_t>(static_cast<uint32_t>(element >> 32) * 0x85ebca6bu ^ static_cast<uint32_t>(bits >> 32))};
}

// 32 random bits for each element, by its number.
template <typename Bits>
SK_INLINE Bits random_bits(RandomStream stream, Bits element) {
  return hash<Bits>(hash<Bits>(element + stream.key) + stream.high);
}

}  // namespace selfsup_kernels
