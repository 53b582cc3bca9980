// The forward's quadratic part: sums over negatives of exp(score - r), each pair of rows computed once.
//
// Tile (x, y) of the symmetric matrix gives its row sums to the rows of x and its column sums to those of y. A block of
// threads keeps the rows of x and streams blocks y past them. Blocks are paired round a circle, block J with J, J + 1,
// ..., J + n / 2 (mod n), so that every block has the same work. A deterministic run sees all columns of a block's rows
// in one place, at twice the work, and adds each sum to memory once: no order to depend on. Where other processes have
// the other rows, a block of threads sees a part of all columns of its rows.
#include <cstdlib>
#include <cstring>

#include "cuda/info_nce_tiles.h"

namespace selfsup_kernels::cuda {

namespace {

struct SumsArguments {
  const void* stored;
  float* sums;
  const float* state;
  Classes classes;
  bool deterministic, symmetric;
  int chunk;                          // blocks that a work item streams
  int own_block = 0, own_blocks = 0;  // of a view, where rows are not worked on by symmetry
};

// Rows of view u, block x, with the blocks of view v (views: the queue) at offsets [first, last) of the circle.
struct Item {
  int u, v, block, first, last;
};

SK_HOST_DEVICE inline int pieces(int length, int chunk) { return (length + chunk - 1) / chunk; }
SK_HOST_DEVICE inline int view_pairs(const Problem& p) {
  return p.core < 0 ? p.views * (p.views - 1) / 2 : p.views - 1;
}

// Work items of a launch, for n blocks a view and q of the queue.
inline int64_t count_items(const Problem& p, const SumsArguments& a, int n, int q) {
  if (!a.symmetric) return int64_t(a.own_blocks) * p.views * p.columns() * pieces(std::max(n, q), a.chunk);
  return int64_t(n) * ((p.cross() ? 0 : p.views) * pieces(n / 2 + 1, a.chunk) + view_pairs(p) * pieces(n, a.chunk) +
                       p.views * pieces(q, a.chunk));
}

__device__ Item decode(const Problem& p, const SumsArguments& a, int item, int n, int q) {
  const int in_view = a.symmetric ? n : a.own_blocks;
  const int block = item % in_view + (a.symmetric ? 0 : a.own_block);
  item /= in_view;
  int u, v, length, piece;
  const int own = p.cross() ? 0 : p.views * pieces(n / 2 + 1, a.chunk), across = view_pairs(p) * pieces(n, a.chunk);
  if (!a.symmetric) {
    const int all = pieces(max(n, q), a.chunk);
    u = item % p.views;
    piece = item / p.views % all;
    v = item / p.views / all;
    length = p.meets(u, v) ? (v == p.views ? q : n) : 0;
  } else if (item < own) {
    u = v = item % p.views;
    piece = item / p.views;
    // An even circle has its opposite block once, not twice.
    length = n / 2 + (n % 2 == 0 && block >= n / 2 ? 0 : 1);
  } else if (item < own + across) {
    const int pair = (item - own) % view_pairs(p);
    piece = (item - own) / view_pairs(p);
    // Pairs of views: (u, u + d) round a circle of views, each once.
    u = p.core < 0 ? pair % p.views : p.core;
    v = (u + (p.core < 0 ? pair / p.views : pair) + 1) % p.views;
    length = n;
  } else {
    u = (item - own - across) % p.views;
    piece = (item - own - across) / p.views;
    v = p.views;
    length = q;
  }
  return {u, v, block, piece * a.chunk, min(piece * a.chunk + a.chunk, length)};
}

// Adds over the lanes of one column of a fragment (l % 4 alike), halving what a thread holds at every step: at the end
// thread l has the sums of `count` / 8 columns in c, those from the returned one on.
template <int count, int lanes = 16>
__device__ __forceinline__ int scatter_sums(float* c) {
  if constexpr (lanes < 4) {
    return 0;
  } else {
    constexpr int half = count / 2;
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float give = upper ? c[k] : c[k + half];
      const float keep = upper ? c[k + half] : c[k];
      c[k] = keep + __shfl_xor_sync(0xffffffffu, give, lanes);
    }
    const int rest = scatter_sums<half, lanes / 2>(c);
    return rest + (upper ? half : 0);
  }
}

// RESIDENT: a tile's whole rows are in shared memory, x once and y in two stages; else chunks of both, in two stages.
template <typename T, bool EXACT, int M, bool RESIDENT>
SK_KERNEL(threads, M == 1 ? 3 : 2)
sums_kernel(Problem p, SumsArguments a) {
  constexpr int side = 16 * M * tile_warps, N = side / 16, bytes = side * chunk_bytes;
  const int blocks = (p.batch + side - 1) / side, queue_blocks = (p.queue + side - 1) / side;
  const Item item = decode(p, a, static_cast<int>(blockIdx.x), blocks, queue_blocks);
  if (item.first >= item.last) return;
  const int u = item.u, v = item.v;
  const bool queue = v == p.views;
  const int limit = p.limit(v);
  const int row_bytes = p.stride * static_cast<int>(sizeof(T)), chunks = (row_bytes + chunk_bytes - 1) / chunk_bytes;
  const int x_local = item.block * side, x_row = u * p.padded + x_local;
  const int warp_row = 16 * M * static_cast<int>(threadIdx.x / 32);
  const Score score = score_reference(a.state, p.normalize);
  const bool low_parts = a.state[state_infinite] == 0;

  unsigned char* shared = shared_memory();
  unsigned char* stages = RESIDENT ? shared + chunks * bytes : shared;
  const int stage_bytes = RESIDENT ? chunks * bytes : 2 * bytes;
  auto block_at = [&](int offset) {
    if (queue) return offset;
    return item.block + offset < blocks ? item.block + offset : item.block + offset - blocks;
  };
  // A stage of the pipeline: a whole tile, or one chunk of it.
  auto fetch = [&](int offset, int chunk, int stage) {
    if (offset < item.last) {
      unsigned char* to = stages + stage * stage_bytes;
      const int64_t row = v * p.padded + block_at(offset) * side;
      if constexpr (RESIDENT) {
        for (int c = 0; c < chunks; ++c) fetch_chunk<side>(to + c * bytes, a.stored, row, c, row_bytes);
      } else {
        fetch_chunk<side>(to, a.stored, x_row, chunk, row_bytes);
        fetch_chunk<side>(to + bytes, a.stored, row, chunk, row_bytes);
      }
    }
    async_commit();
  };
  auto depths = [&](int chunk) {
    return min(chunk_bytes, row_bytes - chunk * chunk_bytes + depth_bytes - 1) / depth_bytes;
  };

  if constexpr (RESIDENT)
    for (int c = 0; c < chunks; ++c) fetch_chunk<side>(shared + c * bytes, a.stored, x_row, c, row_bytes);
  fetch(item.first, 0, 0);
  float row_sums[M][2] = {};
  int stage = 0;
  for (int offset = item.first; offset < item.last; ++offset) {
    float s[N][M][2][4] = {};
    if constexpr (RESIDENT) {
      next_stage();
      fetch(offset + 1, 0, 1 - stage);
      const unsigned char* y = stages + stage * stage_bytes;
      for (int c = 0; c < chunks; ++c)
        add_scores<T, EXACT>(s, shared + c * bytes, y + c * bytes, warp_row, depths(c), low_parts);
      stage = 1 - stage;
    } else {
      for (int c = 0; c < chunks; ++c, stage = 1 - stage) {
        next_stage();
        const bool last = c + 1 == chunks;
        fetch(last ? offset + 1 : offset, last ? 0 : c + 1, 1 - stage);
        const unsigned char* xy = stages + stage * stage_bytes;
        add_scores<T, EXACT, M == 1 ? 2 : 1>(s, xy, xy + bytes, warp_row, depths(c), low_parts);
      }
    }

    const int y_block = block_at(offset), y_local = y_block * side;
    const bool diagonal = u == v && y_block == item.block;
    // Tiles of which no pair is left out, nearly all, need no masks.
    bool clean = x_local + side <= p.batch && y_local + side <= limit;
    if (!queue) {
      if (p.labels)
        clean = clean && (a.classes.end[x_local + side - 1] <= y_local || a.classes.begin[x_local] >= y_local + side);
      else
        clean = clean && y_block != item.block;
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int r = 0; r < 4; ++r) s[n][m][h][r] = relative_exponential(s[n][m][h][r], score);
    if (!clean) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = x_local + warp_row + tile_row(m, 2 * half);
          const int x_class = p.labels && x < p.batch ? a.classes.begin[x] : x;
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int r = 2 * half; r < 2 * half + 2; ++r) {
                const int y = y_local + tile_column(n, h, r);
                bool keep = x < p.batch && y < limit;
                if (keep && !queue) keep = (p.labels ? a.classes.begin[y] : y) != x_class;
                if (!keep) s[n][m][h][r] = 0;
              }
        }
    }
    // On the diagonal the tile holds each pair twice, and the row sums have them all.
    if (a.symmetric && !queue && !diagonal) {
      float columns[4 * N];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float sum = 0;
#pragma unroll
            for (int m = 0; m < M; ++m) sum += s[n][m][h][r] + s[n][m][h][r + 2];
            columns[4 * n + 2 * h + r] = sum;
          }
      const int at = scatter_sums<4 * N>(columns);
#pragma unroll
      for (int k = 0; k < N / 2; ++k) {
        const int c = at + k, y = y_local + tile_column(c / 4, c / 2 % 2, c % 2);
        if (y < p.batch) atomicAdd(a.sums + static_cast<int64_t>(u) * p.rows() + v * p.padded + y, columns[k]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          row_sums[m][0] += s[n][m][h][0] + s[n][m][h][1];
          row_sums[m][1] += s[n][m][h][2] + s[n][m][h][3];
        }
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sums[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int x = x_local + warp_row + tile_row(m, 2 * half);
      if (threadIdx.x % 4 == 0 && x < p.batch)
        atomicAdd(a.sums + static_cast<int64_t>(v) * p.rows() + u * p.padded + x, sum);
    }
}

template <typename T, bool EXACT, int M>
void launch(const Device& device, const Problem& p, SumsArguments a) {
  constexpr int side = 16 * M * tile_warps, bytes = side * chunk_bytes;
  const int n = ceil_div(p.batch, side), q = ceil_div(p.queue, side);
  a.own_block = p.own_block(side);
  a.own_blocks = p.own_blocks(side);
  // Long enough to load the rows of x once for many tiles, short enough for eight rounds of work.
  const int64_t own = p.cross() ? 0 : p.views;
  const int64_t tiles = a.symmetric ? n * (own * (n / 2 + 1) + int64_t(view_pairs(p)) * n + int64_t(p.views) * q)
                                    : int64_t(a.own_blocks) * p.views * (int64_t(p.views) * n + q);
  a.chunk = a.deterministic
                ? std::max(n, q)
                : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(64, tiles / (16 * device.processors()))));
  const int64_t items = count_items(p, a, n, q);
  const int chunks = ceil_div(p.stride * sizeof(T), chunk_bytes);
  const int64_t resident = int64_t(3) * chunks * bytes;
  STD_TORCH_CHECK(items < (int64_t(1) << 31), "impl='cuda': too many pairs of blocks; use impl='reference'");
  const dim3 grid(static_cast<unsigned>(items));
  if (resident <= device.shared_limit())
    device.launch(sums_kernel<T, EXACT, M, true>, grid, threads, resident, p, a);
  else if constexpr (EXACT && M == 2)
    launch<T, EXACT, 1>(device, p, a);  // one more buffer's addresses than there are registers for
  else
    device.launch(sums_kernel<T, EXACT, M, false>, grid, threads, 4 * bytes, p, a);
}

template <typename T, bool EXACT>
void launch_for_size(const Device& device, const Problem& p, const SumsArguments& a) {
  // Large tiles read less shared memory for each product; a few of them leave the machine idle. The variable
  // ("large", "small") is for measurements and tests.
  const int64_t n = ceil_div(p.batch, 128), tiles = n * n * p.views * p.views / 2;
  const char* forced = std::getenv("SELFSUP_KERNELS_CUDA_TILES");
  if (forced ? std::strcmp(forced, "large") == 0 : tiles >= 4 * device.processors())
    return launch<T, EXACT, 2>(device, p, a);
  launch<T, EXACT, 1>(device, p, a);
}

}  // namespace

void pair_sums(
    const Device& device, const Problem& p, const Stored& stored, Classes classes, bool deterministic, bool exact) {
  SumsArguments a{
      stored.rows.data_ptr(),
      pointer<float>(stored.sums),
      pointer<float>(stored.state),
      classes,
      deterministic,
      !(deterministic || p.partial()),
      1};
  by_dtype(stored.rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (exact && sizeof(T) == 4) return launch_for_size<T, sizeof(T) == 4>(device, p, a);
    launch_for_size<T, false>(device, p, a);
  });
}

}  // namespace selfsup_kernels::cuda
