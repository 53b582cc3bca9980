// What functions that serve the host and the device are declared with.
#pragma once

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__
#define SK_INLINE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE
// Always inlined, so that no copy that was compiled for one instruction set serves another (see cpu/simd.h).
#define SK_INLINE inline __attribute__((always_inline))
#endif
