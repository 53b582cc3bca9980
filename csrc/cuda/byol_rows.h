// Row access for `byol.cu`: packs of 16 bytes, and sums over a warp or a block.
#pragma once

#include <cstring>

#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace selfsup_kernels::cuda {

constexpr int threads = 256;
constexpr int warps = threads / 32;

// n numbers that are loaded or stored at once: 16 bytes of an aligned row, else one number. They stay in the storage
// type; 16-bit types then take half the registers of float32.
template <typename T, int n>
struct RowPack {
  T raw[n];

  __device__ void read(const T* from) {
    if constexpr (n == 1) {
      raw[0] = *from;
    } else {
      static_assert(n * sizeof(T) == 16);
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
      memcpy(raw, &bits, 16);
    }
  }
  __device__ void write(T* to) const {
    if constexpr (n == 1) {
      *to = raw[0];
    } else {
      uint4 bits;
      memcpy(&bits, raw, 16);
      *reinterpret_cast<uint4*>(to) = bits;
    }
  }
  __device__ float operator[](int k) const { return static_cast<float>(raw[k]); }
};

// Packs of a row in flight at once. With packs of 16 bytes a thread has 32 bytes of each of two rows in flight.
template <typename T, int n>
constexpr int in_flight = n == 1 ? 4 : 2;

// The `width` threads that share a row; this thread has number `rank`.
template <int group_warps>
struct Group {
  static constexpr int width = 32 * group_warps;
  int rank = threadIdx.x % width;

  // Sums N numbers over the group, in a fixed order. `scratch`: 2 * warps * N doubles of the block.
  template <typename A, int N>
  __device__ void sum(A (&x)[N], void* scratch) const {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], lanes);
    if constexpr (group_warps > 1) {
      A* parts = static_cast<A*>(scratch);
      __syncthreads();  // until the previous sums have been read
      if (rank % 32 == 0)
        for (int k = 0; k < N; ++k) parts[rank / 32 * N + k] = x[k];
      __syncthreads();
      for (int k = 0; k < N; ++k) {
        x[k] = parts[k];
        for (int w = 1; w < group_warps; ++w) x[k] += parts[w * N + k];
      }
    }
  }
  // Makes the writes of the group's threads visible to the whole group. A block needs nothing here: the barriers of
  // `sum` separate writing the sum of the targets, reading it and writing it again.
  __device__ void wait() const {
    if constexpr (group_warps == 1) __syncwarp();
  }
};

// Calls use(column, a's pack, b's pack) for this thread's columns, with the loads of several packs in flight at once.
template <typename T, int n, int width, typename Use>
__device__ inline void for_packs(const T* a, const T* b, int64_t dim, int rank, const Use& use) {
  constexpr int many = in_flight<T, n>;
  for (int64_t start = int64_t(rank) * n; start < dim; start += many * width * n) {
    RowPack<T, n> x[many], y[many];
#pragma unroll
    for (int k = 0; k < many; ++k) {
      const int64_t at = start + k * width * n;
      if (at < dim) {
        x[k].read(a + at);
        y[k].read(b + at);
      }
    }
#pragma unroll
    for (int k = 0; k < many; ++k) {
      const int64_t at = start + k * width * n;
      if (at < dim) use(at, x[k], y[k]);
    }
  }
}

// <a, a>, <b, b> and <a, b>.
template <typename T, int n, int group_warps>
__device__ inline void products(
    float (&total)[3], const T* a, const T* b, int64_t dim, const Group<group_warps>& group, void* scratch) {
  for (float& x : total) x = 0;
  for_packs<T, n, Group<group_warps>::width>(a, b, dim, group.rank, [&](int64_t, const auto& x, const auto& y) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      total[0] += x[k] * x[k];
      total[1] += y[k] * y[k];
      total[2] += x[k] * y[k];
    }
  });
  group.sum(total, scratch);
}

// <a, a> and <a, sum - size t>: `sum` is a sum of unit rows, size t is one of them.
template <typename T, int n, int group_warps>
__device__ inline void products_with_sum(
    float (&total)[2],
    const T* a,
    const T* t,
    float size,
    const float* sum,
    int64_t dim,
    const Group<group_warps>& group,
    void* scratch) {
  for (float& x : total) x = 0;
  for_packs<T, n, Group<group_warps>::width>(a, t, dim, group.rank, [&](int64_t at, const auto& x, const auto& y) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      total[0] += x[k] * x[k];
      total[1] += x[k] * (sum[at + k] - y[k] * size);
    }
  });
  group.sum(total, scratch);
}

// N sums in double, element by element, for rows whose squares leave float32's range. terms(column, sums) adds a
// column.
template <int N, int group_warps, typename Terms>
__device__ inline void wide_sums(
    double (&total)[N], int64_t dim, const Group<group_warps>& group, void* scratch, const Terms& terms) {
  for (double& x : total) x = 0;
#pragma unroll 1
  for (int64_t at = group.rank; at < dim; at += Group<group_warps>::width) terms(at, total);
  group.sum(total, scratch);
}

}  // namespace selfsup_kernels::cuda
