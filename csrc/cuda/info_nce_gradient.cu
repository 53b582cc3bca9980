// The backward's quadratic part: for every row i, the sum over its pairs of G_ij z_j,
//   G_ij = exp(S_ij - r) (w_i + w_j).
//
// A block of threads owns a block of rows and a slab of their columns, visits all rows of its share, and makes scores,
// G and the product on the way: no atomics, and the same bits every time. Rows longer than a slab pay for the scores
// again in every slab.
#include "cuda/info_nce_tiles.h"

namespace selfsup_kernels::cuda {

namespace {

struct GradientArguments {
  const void* stored;
  const float *weights, *coef, *upstream, *state;
  Classes classes;
  float* partial;
  int splits;
  float factor;
};

// d loss_i / d S of an anchor's positive with score s, from the anchor's three numbers, without cancellation.
struct ClassRow {
  float pivot, share, factor;
};
__device__ inline float class_coefficient(Objective objective, float s, ClassRow row) {
  const float below = s > row.pivot ? 0.0f : s - row.pivot;  // rounding alone puts a score above the sum it is part of
  switch (objective) {
    case Objective::SupconOut:
      return row.factor * exp2_approximate(below * log2e) - row.share;
    case Objective::SupconIn:
      return -row.factor * exp2_approximate(below * log2e);
    case Objective::PerPositive: {
      const float x = row.pivot - s, y = exp2_approximate(-fabsf(x) * log2e);
      return -row.share * (x > 0 ? 1.0f : y) / (1.0f + y);
    }
    default:
      return -row.share;
  }
}

__device__ inline ClassRow class_row(const GradientArguments& a, int rows, int row) {
  return {a.coef[row], a.coef[rows + row], a.coef[2 * static_cast<int64_t>(rows) + row]};
}

// Blocks of `rows` rows of the views that rows of view u meet, in order; the queue alone for the last share.
struct TileIterator {
  int v, block, first, last;
  bool done;

  __device__ TileIterator(const Problem& p, int u, int share, int splits, int rows) {
    const bool queue = share == splits;
    const int blocks = ((queue ? p.queue : p.batch) + rows - 1) / rows;
    const int per = queue ? blocks : (blocks + splits - 1) / splits;
    first = queue ? 0 : min(share * per, blocks);
    last = min(first + per, blocks);
    v = queue ? p.views : 0;
    block = first;
    done = first >= last;
    if (!done && !p.meets(u, v)) next_view(p, u);
  }
  __device__ void next_view(const Problem& p, int u) {
    block = first;
    do ++v;
    while (v < p.views && !p.meets(u, v));
    done = v >= p.views;
  }
  __device__ void next(const Problem& p, int u) {
    if (++block == last) next_view(p, u);
  }
};

// M: 16 M rows of each warp; N: 16 N rows of the tiles that pass by; SLAB: chunks of the columns that are summed.
// RESIDENT: whole rows are in shared memory (and SLAB holds them), those of x once, those of y in two stages; else
// chunks, in two stages.
template <typename T, bool EXACT, int M, int N, int SLAB, bool RESIDENT>
SK_KERNEL(threads, 1)
gradient_kernel(Problem p, GradientArguments a) {
  constexpr int x_side = 16 * M * tile_warps, y_side = 16 * N, D = chunk_width<T> / 16;
  constexpr int x_bytes = x_side * chunk_bytes, y_bytes = y_side * chunk_bytes;
  const int blocks = p.own_blocks(x_side), x_block = p.own_block(x_side) + static_cast<int>(blockIdx.x) % blocks;
  const int u = static_cast<int>(blockIdx.x) / blocks, x_local = x_block * x_side;
  const int slab = static_cast<int>(blockIdx.y) * SLAB, share = blockIdx.z;
  const bool queue = share == a.splits;
  const int x_row = u * p.padded + x_local, limit = queue ? p.queue : p.batch;
  const int row_bytes = p.stride * static_cast<int>(sizeof(T)), chunks = (row_bytes + chunk_bytes - 1) / chunk_bytes;
  const int warp_row = 16 * M * static_cast<int>(threadIdx.x / 32);
  const Score score = score_reference(a.state, p.normalize);
  const bool slow = a.state[state_slow] > 0;
  const bool low_parts = a.state[state_infinite] == 0;
  const int rows = p.rows();
  const float* logw = a.weights + static_cast<int64_t>(p.columns()) * rows;
  // The classes of the rows of x lie between these.
  const int x_begin = p.labels ? a.classes.begin[x_local] : 0;
  const int x_end = p.labels ? a.classes.end[min(x_local + x_side, p.batch) - 1] : 0;

  unsigned char* shared = shared_memory();
  unsigned char* stages = RESIDENT ? shared + chunks * x_bytes : shared;
  const int stage_bytes = RESIDENT ? chunks * y_bytes : x_bytes + y_bytes;
  const int slabs = min(SLAB, chunks - slab);
  auto depths = [&](int chunk) {
    return min(chunk_bytes, row_bytes - chunk * chunk_bytes + depth_bytes - 1) / depth_bytes;
  };

  // The stages of a tile: all of it; or a chunk of x and y for each chunk of the scores, then the slab's of y.
  const int stages_of_tile = RESIDENT ? 1 : chunks + slabs;
  TileIterator ahead(p, u, share, a.splits, y_side);
  TileIterator tile = ahead;
  int fetched = 0, part = 0;
  auto fetch = [&] {
    if (!ahead.done) {
      unsigned char* to = stages + fetched % 2 * stage_bytes;
      const int64_t row = ahead.v * p.padded + ahead.block * y_side;
      if constexpr (RESIDENT) {
        for (int c = 0; c < chunks; ++c) fetch_chunk<y_side>(to + c * y_bytes, a.stored, row, c, row_bytes);
      } else {
        if (part < chunks) fetch_chunk<x_side>(to, a.stored, x_row, part, row_bytes);
        fetch_chunk<y_side>(to + x_bytes, a.stored, row, part < chunks ? part : slab + part - chunks, row_bytes);
      }
      if (++part == stages_of_tile) {
        part = 0;
        ahead.next(p, u);
      }
    }
    async_commit();
    ++fetched;
  };
  int used = 0;
  // The next stage that was fetched; the one after it is on its way.
  auto acquire = [&] {
    next_stage();
    fetch();
    return stages + used++ % 2 * stage_bytes;
  };

  float out[SLAB][D][M][2][4] = {};
  if constexpr (RESIDENT)
    if (!tile.done)
      for (int c = 0; c < chunks; ++c) fetch_chunk<x_side>(shared + c * x_bytes, a.stored, x_row, c, row_bytes);
  fetch();
  for (; !tile.done; tile.next(p, u)) {
    const int v = tile.v, y_local = tile.block * y_side, y_row = v * p.padded + y_local;
    // Weights of this view for rows of x, of view u for rows of y; the queue's rows have no losses of their own, and so
    // no weights. All are asked for at once, and where there are registers for them before the scores, which take
    // longer to make than these to come.
    constexpr bool ahead = RESIDENT && !EXACT;
    bool clean, fast;
    float wx[M][2], wy[N][2][2];
    auto prepare = [&] {
      // Tiles of which no pair is left out, nearly all, need no masks. Pairs of one sample only have to be left out;
      // those of one class have a gradient of another kind.
      clean = x_local + x_side <= p.batch && y_local + y_side <= limit;
      if (!queue)
        clean = clean && (p.labels ? x_end <= y_local || x_begin >= y_local + y_side
                                   : y_local + y_side <= x_local || x_local + x_side <= y_local);
      fast = !slow && (clean || !p.labels);
      const float* x_weights = a.weights + static_cast<int64_t>(v) * rows + x_row + warp_row;
      const float* y_weights = a.weights + static_cast<int64_t>(u) * rows + y_row;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = tile_row(m, 2 * half);
          wx[m][half] = fast && x_local + warp_row + x < p.batch ? x_weights[x] : 0.0f;
        }
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int y = tile_column(n, h, q);
            wy[n][h][q] = fast && !queue && y_local + y < limit ? y_weights[y] : 0.0f;
          }
    };
    if constexpr (ahead) prepare();

    float g[N][M][2][4] = {};
    const unsigned char* stage = nullptr;
    if constexpr (RESIDENT) {
      stage = acquire();
      for (int c = 0; c < chunks; ++c)
        add_scores<T, EXACT>(g, shared + c * x_bytes, stage + c * y_bytes, warp_row, depths(c), low_parts);
    } else {
      for (int c = 0; c < chunks; ++c) {
        stage = acquire();
        add_scores<T, EXACT>(g, stage, stage + x_bytes, warp_row, depths(c), low_parts);
      }
    }

    if constexpr (!ahead) prepare();
    if (fast) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          wx[m][half] *= a.factor * (a.upstream ? a.upstream[x_row + warp_row + tile_row(m, 2 * half)] : 1.0f);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < 2; ++q)
            wy[n][h][q] *= a.factor * (a.upstream && !queue ? a.upstream[y_row + tile_column(n, h, q)] : 1.0f);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float& s = g[n][m][h][2 * half + q];
                s = relative_exponential(s, score) * (wx[m][half] + wy[n][h][q]);
              }
      if (!clean) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              const int y = y_local + tile_column(n, h, q);
#pragma unroll
              for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const int x = x_local + warp_row + tile_row(m, 2 * half);
                  if (x >= p.batch || y >= limit || (!queue && x == y)) g[n][m][h][2 * half + q] = 0;
                }
            }
      }
    } else {
      // Pairs of one sample (of one class) are told apart, and weights of any size are right, at the price of two
      // exponentials.
      const float* x_slow = logw + static_cast<int64_t>(v) * rows + x_row + warp_row;
      const float* y_slow = logw + static_cast<int64_t>(u) * rows + y_row;
      float lx[M][2], gx[M][2];
      int x_class[M][2];  // without labels every row is a class of its own; negative: no row
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = tile_row(m, 2 * half), x = x_local + warp_row + row;
          const bool x_in = x < p.batch;
          lx[m][half] = x_in ? x_slow[row] : -INFINITY;
          gx[m][half] = x_in && a.upstream ? a.upstream[x_row + warp_row + row] : 1.0f;
          x_class[m][half] = x_in ? (p.labels ? a.classes.begin[x] : x) : -1;
        }
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int row = tile_column(n, h, q), y = y_local + row;
            const bool y_in = y < limit, own = y_in && !queue;
            const float ly = own ? y_slow[row] : -INFINITY;
            const float gy = own && a.upstream ? a.upstream[y_row + row] : 1.0f;
            const int y_class = own ? (p.labels ? a.classes.begin[y] : y) : -2;
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float& value = g[n][m][h][2 * half + q];
                const float s = value * score.scale;
                const int x = x_local + warp_row + tile_row(m, 2 * half);
                // Probabilities: where a long row's score was rounded otherwise than in its sum, at most 1 all the
                // same. Not by a minimum, which may drop NaN.
                const float ex = s + lx[m][half], ey = s + ly;
                value = gx[m][half] * exp2_approximate((ex > 0 ? 0.0f : ex) * log2e);
                if (!queue) value += gy * exp2_approximate((ey > 0 ? 0.0f : ey) * log2e);
                const bool same = x_class[m][half] == y_class;
                if (!y_in || x_class[m][half] < 0 || same) value = 0;
                if (p.labels && same && x != y)
                  value = gx[m][half] * class_coefficient(p.objective, s, class_row(a, rows, x)) +
                          gy * class_coefficient(p.objective, s, class_row(a, rows, y));
                value *= a.factor;
              }
          }
    }

#pragma unroll
    for (int c = 0; c < SLAB; ++c) {
      if (c >= slabs) break;
      const unsigned char* y = RESIDENT ? stage + c * y_bytes : acquire() + x_bytes;
      if constexpr (EXACT) {
        // The tensor cores cut off what they add up; over many tiles float32's own additions keep what that would lose.
        float tile_sum[D][M][2][4] = {};
        add_products<T, EXACT>(tile_sum, g, y, low_parts);
#pragma unroll
        for (int d = 0; d < D; ++d)
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int r = 0; r < 4; ++r) out[c][d][m][h][r] += tile_sum[d][m][h][r];
      } else {
        add_products<T, EXACT>(out[c], g, y, low_parts);
      }
    }
  }

  float* to = a.partial + (static_cast<int64_t>(share * p.views + u) * p.part_rows() - p.part_first()) * p.stride;
#pragma unroll
  for (int c = 0; c < SLAB; ++c)
#pragma unroll
    for (int d = 0; d < D; ++d)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int x = x_local + warp_row + tile_row(m, 2 * half);
            const int column = (slab + c) * chunk_width<T> + tile_column(d, h, 0);
            // Strides are even, so that a pair is inside or not.
            if (x < p.batch && column < p.stride)
              *reinterpret_cast<float2*>(to + static_cast<int64_t>(x) * p.stride + column) =
                  make_float2(out[c][d][m][h][2 * half], out[c][d][m][h][2 * half + 1]);
          }
}

template <typename T, bool EXACT, int M, int N, int SLAB, bool RESIDENT>
void launch(const Device& device, const Problem& p, const GradientArguments& a) {
  constexpr int x_bytes = 16 * M * tile_warps * chunk_bytes, y_bytes = 16 * N * chunk_bytes;
  const int chunks = ceil_div(p.stride * sizeof(T), chunk_bytes);
  const size_t shared = RESIDENT ? chunks * (x_bytes + 2 * y_bytes) : 2 * (x_bytes + y_bytes);
  const dim3 grid(
      p.views * p.own_blocks(16 * M * tile_warps), ceil_div(chunks, SLAB), a.splits + (p.queue > 0 ? 1 : 0));
  device.launch(gradient_kernel<T, EXACT, M, N, SLAB, RESIDENT>, grid, threads, shared, p, a);
}

template <typename T, bool EXACT>
void launch_for_width(const Device& device, const Problem& p, const GradientArguments& a) {
  // 32 rows a warp, where registers allow it, read less shared memory for each product than 16.
  constexpr int M = sizeof(T) == 2 ? 2 : 1;
  const int chunks = ceil_div(p.stride * sizeof(T), chunk_bytes);
  if (chunks <= 1) return launch<T, EXACT, M, 4 / M, 1, true>(device, p, a);
  if constexpr (sizeof(T) == 2)
    if (chunks <= 2) return launch<T, EXACT, M, 4 / M, 2, true>(device, p, a);
  if (chunks <= 4) return launch<T, EXACT, 1, 4, 4, true>(device, p, a);
  launch<T, EXACT, 1, 4, 4, false>(device, p, a);
}

}  // namespace

Partial gradient(
    const Device& device, const Problem& p, const Saved& saved, Classes classes, float factor, bool exact) {
  // Few rows leave most of the machine idle: the columns of a block of rows go to several.
  constexpr int side = 16 * tile_warps;
  const int blocks = p.views * p.own_blocks(side);
  const int splits = std::max(1, std::min<int>(ceil_div(p.batch, side), 2 * device.processors() / blocks));
  const int queues = p.queue > 0 ? 1 : 0;
  Partial partial{
      new_tensor(saved.rows, {splits + queues, p.views * p.part_rows(), p.stride}, ScalarType::Float), splits};
  const GradientArguments a{
      saved.rows.data_ptr(),
      pointer<const float>(saved.weights),
      pointer<const float>(saved.coef),
      saved.upstream,
      pointer<const float>(saved.state),
      classes,
      pointer<float>(partial.sums),
      splits,
      factor};
  by_dtype(saved.rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (exact && sizeof(T) == 4) return launch_for_width<T, sizeof(T) == 4>(device, p, a);
    launch_for_width<T, false>(device, p, a);
  });
  return partial;
}

}  // namespace selfsup_kernels::cuda
