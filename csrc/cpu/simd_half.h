// Loads and stores of bfloat16 and float16 as vectors of float. See simd.h for the rules.
#pragma once

#include "cpu/simd.h"

namespace selfsup_kernels::SK_ARCH {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t HalfBits __attribute__((vector_size(SK_VECTOR_BYTES / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(SK_VECTOR_BYTES)));

inline HalfBits load_bits(const void* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof(h));
  return h;
}

inline FloatBits pick(FloatBits mask, FloatBits yes, FloatBits no) { return (mask & yes) | (~mask & no); }

// load_as<T>(pointer to the storage type) loads one vector of the arithmetic type T.
template <typename T>
inline Vec<T> load_as(const T* p) {
  return load<T>(p);
}

template <typename T>
inline Vec<T> load_as(const BFloat16* p) {
  return (Vec<T>)(__builtin_convertvector(load_bits(p), FloatBits) << 16);
}

template <typename T>
inline Vec<T> load_as(const Float16* p) {
#if defined(SK_AVX512)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_bits(p));
#elif defined(SK_AVX2)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)load_bits(p));
#else
  FloatBits h = __builtin_convertvector(load_bits(p), FloatBits);
  FloatBits magnitude = (h & 0x7fff) << 13;
  // 2^112 moves the exponent from float16's bias to float32's, and makes subnormals normal.
  FloatBits value = (FloatBits)((Vec<float>)magnitude * 5.192296858534828e33f);
  FloatBits special = (FloatBits)(magnitude >= (0x7c00u << 13));
  value = pick(special, magnitude | 0x7f800000u, value);
  return (Vec<float>)(value | ((h & 0x8000) << 16));
#endif
}

template <typename T>
inline void store_as(T* p, Vec<T> v) {
  store<T>(p, v);
}

inline void store_bits(void* p, FloatBits v) {
  HalfBits h = __builtin_convertvector(v, HalfBits);
  std::memcpy(p, &h, sizeof(h));
}

// Round to nearest, ties to even.
inline void store_as(BFloat16* p, Vec<float> v) {
  FloatBits bits = (FloatBits)v;
  FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  FloatBits nan = (FloatBits)(v != v);
  store_bits(p, pick(nan, (bits >> 16) | 0x40, rounded));
}

inline void store_as(Float16* p, Vec<float> v) {
#if defined(SK_AVX512)
  HalfBits h = (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof(h));
#elif defined(SK_AVX2)
  HalfBits h = (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof(h));
#else
  FloatBits bits = (FloatBits)v;
  FloatBits sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  // Normal results: rebias, round half to even. Subnormal ones: adding 0.5 aligns the bits and rounds in hardware.
  FloatBits normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  FloatBits subnormal = (FloatBits)((Vec<float>)bits + 0.5f) - 0x3f000000u;
  FloatBits result = pick((FloatBits)(bits < (113u << 23)), subnormal, normal);
  result = pick((FloatBits)(bits >= 0x477ff000u), FloatBits{} + 0x7c00, result);
  result = pick((FloatBits)(bits > 0x7f800000u), FloatBits{} + 0x7e00, result);
  store_bits(p, result | sign);
#endif
}

// Stochastic rounding, as in common/rounding.h. `random` holds 32 uniform bits per lane.
inline void store_stochastically(BFloat16* p, Vec<float> v, FloatBits random) {
  FloatBits bits = (FloatBits)v;
  FloatBits rounded = (bits + (random >> 16)) >> 16;
  FloatBits magnitude = bits & 0x7fffffffu;
  FloatBits keep = (FloatBits)(magnitude >= 0x7f7f0000u);  // to nearest in the last step below Inf, and for Inf and NaN
  uint16_t nearest[lanes<float>];
  store_as(reinterpret_cast<BFloat16*>(nearest), v);
  store_bits(p, pick(keep, __builtin_convertvector(load_bits(nearest), FloatBits), rounded));
}

inline void store_stochastically(Float16* p, Vec<float> v, FloatBits random) {
  FloatBits bits = (FloatBits)v;
  FloatBits sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  FloatBits normal = (bits - (112u << 23) + (random >> 19)) >> 13;
  // Below 2^-14 the step is 2^-24: scale to integers, add a fraction in [0, 1), truncate.
  Vec<float> steps = (Vec<float>)bits * 16777216.0f;
  Vec<float> fraction = __builtin_convertvector(random >> 8, Vec<float>) * 5.9604644775390625e-8f;
  FloatBits whole = (FloatBits) __builtin_convertvector(steps, IntVec<float>);
  Vec<float> rest = steps - __builtin_convertvector((IntVec<float>)whole, Vec<float>);
  FloatBits subnormal = whole + ((FloatBits)(fraction < rest) & 1);
  FloatBits is_small = (FloatBits)(bits < (113u << 23));
  FloatBits result = pick(is_small, subnormal, normal) | sign;
  FloatBits keep = (FloatBits)(bits >= 0x477fe000u);  // 65504 and above, Inf and NaN: to nearest
  uint16_t nearest[lanes<float>];
  store_as(reinterpret_cast<Float16*>(nearest), v);
  store_bits(p, pick(keep, __builtin_convertvector(load_bits(nearest), FloatBits), result));
}

}  // namespace selfsup_kernels::SK_ARCH
