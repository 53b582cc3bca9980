// Tiles of stored rows in shared memory, and their products on the tensor cores.
//
// A tile is cut into chunks of 128 bytes of each row; a chunk lies as (rows, 8 units of 16 bytes), unit u of row r at
// u ^ (r % 8), so that eight rows' units of one column are in different banks. A warp owns 16 M rows of one tile ("x")
// and meets all rows of the other ("y"), 16 at a time: s[n][m][h] is the 16 x 8 fragment of x's rows 16 m and y's rows
// 16 n + 8 h; in it thread l holds rows l / 4 and l / 4 + 8 (numbers 0, 1 and 2, 3), columns 2 (l % 4) and the next.
#pragma once

#include "cuda/info_nce.h"
#include "cuda/ptx.h"

namespace selfsup_kernels::cuda {

constexpr int chunk_bytes = 128;
constexpr int depth_bytes = 32;  // of one product
constexpr int threads = 128;     // of every kernel on tiles: four warps
constexpr int tile_warps = threads / 32;

template <typename T>
constexpr int chunk_width = chunk_bytes / static_cast<int>(sizeof(T));

__device__ inline int place(int row, int unit) { return row * chunk_bytes + ((unit ^ (row & 7)) << 4); }

// Starts to copy a chunk of `rows` rows from `row` on; what lies past the end of a row is zero.
template <int rows>
__device__ inline void fetch_chunk(unsigned char* to, const void* stored, int64_t row, int chunk, int row_bytes) {
  const char* from = static_cast<const char*>(stored) + row * row_bytes;
#pragma unroll
  for (int k = 0; k < rows * 8 / threads; ++k) {
    const int r = (k * threads + threadIdx.x) / 8, u = threadIdx.x % 8;
    const int at = chunk * chunk_bytes + u * 16;
    const bool inside = at < row_bytes;
    async_copy_16(to + place(r, u), from + static_cast<int64_t>(r) * row_bytes + (inside ? at : 0), inside);
  }
}

// What was fetched before is there, and every thread is done with the stage that is filled next.
__device__ inline void next_stage() {
  async_wait<0>();  // wait of next_stage
  __syncthreads();  // barrier of next_stage
}

// c += a b. With EXACT floats are split into two TF32 numbers, which keeps all but 2^-22 of the product; not with an
// infinity among them (`low_parts`), whose products with the low parts would be NaN or of either sign.
template <typename T, bool EXACT, int M>
__device__ inline void multiply(
    float (&c)[M][2][4], const uint32_t (&a)[M][4], const uint32_t (&b)[2][2], bool low_parts) {
  if constexpr (sizeof(T) == 2) {
    warp_multiply<T>(c, a, b);
  } else {
    uint32_t a_high[M][4], a_low[M][4], b_high[2][2], b_low[2][2];
    auto split = [](uint32_t x, uint32_t& high, uint32_t& low) {
      const float h = to_tf32(__uint_as_float(x));
      high = __float_as_uint(h);
      if constexpr (EXACT) low = __float_as_uint(__uint_as_float(x) - h);
    };
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 4; ++r) split(a[m][r], a_high[m][r], a_low[m][r]);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int r = 0; r < 2; ++r) split(b[h][r], b_high[h][r], b_low[h][r]);
    if constexpr (EXACT)
      if (low_parts) {
        warp_multiply<T>(c, a_low, b_high);
        warp_multiply<T>(c, a_high, b_low);
      }
    warp_multiply<T>(c, a_high, b_high);
  }
}

// s += inner products over a chunk of the warp's rows of x (from row `first` of the tile on) with the rows of y.
// `depths`: how many products of 32 bytes the chunk has. AT_ONCE: of those, whose loads and products overlap, for which
// there have to be registers.
template <typename T, bool EXACT, int AT_ONCE = 2, int M, int N>
__device__ inline void add_scores(
    float (&s)[N][M][2][4], const unsigned char* x, const unsigned char* y, int first, int depths, bool low_parts) {
  const int lane = threadIdx.x % 32;
#pragma unroll AT_ONCE
  for (int k = 0; k < depths; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) warp_load_matrices(a[m], x + place(first + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint32_t r[4];
      warp_load_matrices(r, y + place(16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
      multiply<T, EXACT>(s[n], a, b, low_parts);
    }
  }
}

// out[d] += g y over a chunk of y's columns: 16 columns at a time, those from 16 d on. g lies as scores do.
template <typename T, bool EXACT, int M, int N, int D>
__device__ inline void add_products(
    float (&out)[D][M][2][4], const float (&g)[N][M][2][4], const unsigned char* y, bool low_parts) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if constexpr (sizeof(T) == 2) {
      uint32_t a[M][4];  // a fragment of products is one of factors, in the same threads
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][r] = pack<T>(g[n][m][r / 2][r % 2 * 2], g[n][m][r / 2][r % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < D; ++d) {
        uint32_t r[4];
        warp_load_matrices_transposed(r, y + place(16 * n + lane % 16, 2 * d + lane / 16));
        const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
        multiply<T, EXACT>(out[d], a, b, low_parts);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The order of the depth is free: depths t and t + 4 of the product are columns 2 t and 2 t + 1 of g.
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r) a[m][r] = __float_as_uint(g[n][m][h][r % 2 * 2 + r / 2]);
        const int row = 16 * n + 8 * h + 2 * (lane % 4);
#pragma unroll
        for (int d = 0; d < D; ++d) {
          uint32_t b[2][2];
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int column = 16 * d + 8 * q + lane / 4;
#pragma unroll
            for (int r = 0; r < 2; ++r)
              b[q][r] = *reinterpret_cast<const uint32_t*>(y + place(row + r, column / 4) + column % 4 * 4);
          }
          multiply<T, EXACT>(out[d], a, b, low_parts);
        }
      }
    }
  }
}

// Rows of a tile that thread l's numbers of s belong to.
__device__ inline int tile_row(int m, int r) { return 16 * m + threadIdx.x % 32 / 4 + 8 * (r / 2); }
__device__ inline int tile_column(int n, int h, int r) { return 16 * n + 8 * h + 2 * (threadIdx.x % 4) + r % 2; }

}  // namespace selfsup_kernels::cuda
