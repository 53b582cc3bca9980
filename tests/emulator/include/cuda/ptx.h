// Stands in for csrc/cuda/ptx.h, which says what each function does; the layouts of the fragments are PTX's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/launch.h"

namespace selfsup_kernels::cuda {

using c10::BFloat16;
using c10::Half;

inline void async_copy_16(void* to, const void* from, bool valid) { sk_emulator::async_copy(to, from, 16, valid); }
inline void async_commit() { sk_emulator::async_commit(); }
template <int pending>
inline void async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  sk_emulator::async_wait(pending, file, line);
}

namespace emulated {

struct Matrices {
  uint32_t r[4];
  const void* row;
};
template <bool transposed>
void load_matrices(void* const* lanes) {
  for (int l = 0; l < 32; ++l)
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = transposed ? 2 * (l % 4) + k : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + k;
        const void* from = static_cast<Matrices*>(lanes[8 * matrix + row])->row;
        if (reinterpret_cast<uintptr_t>(from) % 16) std::abort();
        std::memcpy(&pair[k], static_cast<const char*>(from) + 2 * column, 2);
      }
      std::memcpy(&static_cast<Matrices*>(lanes[l])->r[matrix], pair, 4);
    }
}
template <bool transposed>
void warp_load(uint32_t (&r)[4], const void* row) {
  Matrices mine{{}, row};
  sk_emulator::warp_meet(load_matrices<transposed>, &mine, transposed ? "ldmatrix.trans" : "ldmatrix");
  std::memcpy(r, mine.r, sizeof r);
}

// The number of depth `k` (0 or 1 in a 16-bit register) in a register.
template <typename T>
float element(uint32_t r, int k) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(r & 0xffffe000u);
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&r) + 2 * k, 2);
  return static_cast<float>(value);
}

template <typename T, int M, int N>
struct Products {
  float (*c)[N][4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};
template <typename T, int M, int N>
void multiply(void* const* lanes) {
  // Numbers in a register, and depths of a product: register r of a fragment holds depths (r's half, thread % 4, k).
  constexpr int numbers = 4 / sizeof(T), depth = 8 * numbers;
  auto lane = [&](int l) { return static_cast<Products<T, M, N>*>(lanes[l]); };
  float a[M][16][depth], b[N][8][depth];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      for (int k = 0; k < numbers; ++k) {
        const int at = (r / 2) * (depth / 2) + l % 4 * numbers + k;
        for (int m = 0; m < M; ++m) a[m][l / 4 + 8 * (r % 2)][at] = element<T>(lane(l)->a[m][r], k);
      }
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < numbers; ++k)
        for (int n = 0; n < N; ++n)
          b[n][l / 4][r * (depth / 2) + l % 4 * numbers + k] = element<T>(lane(l)->b[n][r], k);
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        for (int r = 0; r < 4; ++r) {
          const float* x = a[m][l / 4 + 8 * (r / 2)];
          const float* y = b[n][2 * (l % 4) + r % 2];
          // Products are exact; the sum of all is cut off, not rounded, as the tensor cores' accumulators are (Fasi et
          // al., "Numerical behavior of NVIDIA tensor cores", 2021).
          double sum = lane(l)->c[m][n][r];
          for (int k = 0; k < depth; ++k) sum += static_cast<double>(x[k]) * y[k];
          const float nearest = static_cast<float>(sum);
          const bool above = std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(sum);
          lane(l)->c[m][n][r] = above ? std::nextafter(nearest, 0.0f) : nearest;
        }
}

}  // namespace emulated

inline void warp_load_matrices(uint32_t (&r)[4], const void* row) { emulated::warp_load<false>(r, row); }
inline void warp_load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::warp_load<true>(r, row); }

template <typename T, int M, int N>
inline void warp_multiply(float (&c)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
  emulated::Products<T, M, N> mine{c, a, b};
  sk_emulator::warp_meet(emulated::multiply<T, M, N>, &mine, "mma");
}

template <typename T>
inline uint32_t pack(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t r;
  std::memcpy(&r, pair, 4);
  return r;
}

inline float to_tf32(float x) {
  return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u) : x;
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace selfsup_kernels::cuda
