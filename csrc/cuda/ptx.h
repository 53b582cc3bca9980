// The instructions that C++ has no words for (compute capability 8.0 and later).
//
// `tests/emulator/include/cuda/ptx.h` takes this file's place in the tests. Functions named `warp_` must be reached by
// all 32 threads of a warp.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace selfsup_kernels::cuda {

using c10::BFloat16;
using c10::Half;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, there after the wait; zeros where not `valid`. Both 16-byte aligned.
__device__ inline void async_copy_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of the thread's copies.
__device__ inline void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `pending` groups of this thread are there. Other threads see them after a barrier.
template <int pending>
__device__ inline void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; thread l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// elements 2 (l % 4) and the next of row l / 4 (transposed: of column l / 4).
__device__ inline void warp_load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void warp_load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, 16 x 8, over 32 bytes of depth: 16 numbers of bfloat16 or float16, 8 of TF32 (of a float the upper 19 bits
// are read). PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".
template <typename T>
__device__ inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define SK_MMA(type, instruction)                                                                                   \
  template <>                                                                                                       \
  __device__ inline void multiply_accumulate<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
SK_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SK_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
SK_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SK_MMA

// The products of M row fragments with N column fragments.
template <typename T, int M, int N>
__device__ inline void warp_multiply(float (&c)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int m = 0; m < M; ++m) multiply_accumulate<T>(c[m][n], a[m], b[n]);
}

// Two numbers, rounded to nearest, in the lower and the upper half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The nearest TF32, as a float.
__device__ inline float to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return __uint_as_float(r);
}

// 2^x to 2 units of the last place; denormal results are 0.
__device__ inline float exp2_approximate(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace selfsup_kernels::cuda
