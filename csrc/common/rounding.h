// Stochastic rounding of one float: away from zero with probability (v - lower) / (upper - lower) of its neighbours.
// `random` holds 32 uniform bits. A finite value stays finite if rounding to nearest keeps it finite.
// `cpu/simd_half.h` does the same for vectors; tests check that both give the same bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace selfsup_kernels {

SK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename T>
SK_HOST_DEVICE inline T round_stochastically(float v, uint32_t random);

template <>
SK_HOST_DEVICE inline c10::BFloat16 round_stochastically(float v, uint32_t random) {
  const uint32_t bits = bits_of(v);
  // Round to nearest in the last step below Inf, and for Inf and NaN.
  if ((bits & 0x7fffffffu) >= 0x7f7f0000u) return static_cast<c10::BFloat16>(v);
  return {static_cast<unsigned short>((bits + (random >> 16)) >> 16), c10::BFloat16::from_bits()};
}

template <>
SK_HOST_DEVICE inline c10::Half round_stochastically(float v, uint32_t random) {
  uint32_t bits = bits_of(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x477fe000u) return static_cast<c10::Half>(v);  // 65504 and above, Inf and NaN: to nearest
  uint32_t rounded = (bits - (112u << 23) + (random >> 19)) >> 13;
  if (bits < (113u << 23)) {
    // Below 2^-14 the step is 2^-24: scale to integers, add a fraction in [0, 1), truncate.
    const float steps = (v < 0 ? -v : v) * 16777216.0f;
    const float fraction = static_cast<float>(random >> 8) * 5.9604644775390625e-8f;
    rounded = static_cast<uint32_t>(steps);
    rounded += fraction < steps - static_cast<float>(rounded);
  }
  return {static_cast<unsigned short>(rounded | sign), c10::Half::from_bits()};
}

}  // namespace selfsup_kernels
