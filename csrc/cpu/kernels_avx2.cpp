// The kernels for x86-64 with AVX2, FMA and F16C. Empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SK_ARCH arch_avx2
#define SK_AVX2
#define SK_VECTOR_BYTES 32
#define SK_TABLE kernels_avx2
#define SK_NAME "avx2"
#include "cpu/kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
