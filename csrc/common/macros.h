// Declaration macros for functions shared by host and device.
#pragma once

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__
#define SK_INLINE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE
// Always inlined, so that a copy compiled for one instruction set is never used for another (see cpu/simd.h).
#define SK_INLINE inline __attribute__((always_inline))
#endif
