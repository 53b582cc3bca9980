// The stages of an InfoNCE call on the GPU, and what they share. `selfsup_kernels/_rows.py` says how rows are stored:
// each view's rows are padded with zeros, the queue's rows come last; with labels all views are one, sorted by class.
#pragma once

#include <optional>
#include <vector>

#include "common/objectives.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace selfsup_kernels::cuda {

// Places in the small tensor that the kernels of one call hand on.
constexpr int state_scale = 0;     // 1 / temperature
constexpr int state_norm = 1;      // the largest squared norm of a row, where rows are not normalised
constexpr int state_slow = 2;      // above 0: a weight is out of range for the backward's fast path
constexpr int state_infinite = 3;  // above 0: there are rows that are not finite
constexpr int state_size = 4;

constexpr float log2e = 1.4426950408889634f;
// Scores are exponentiated relative to max(bound - headroom, 0): exp(70), summed 1e8 times, is a float.
constexpr float headroom = 70;

constexpr int padding = 256;  // `selfsup_kernels/_rows.py` has the same

// What every kernel of a call knows.
struct Problem {
  int views, batch, padded;      // of the stored rows; with labels one view of them all
  int queue, queue_padded;       // rows
  int user_views, samples, dim;  // the user's
  int first, count;              // the samples that are this process's own
  int stride;                    // numbers from one stored row to the next: a multiple of 16 bytes
  int core;                      // negative: none
  Objective objective;
  bool labels, normalize;

  SK_HOST_DEVICE int rows() const { return views * padded; }
  SK_HOST_DEVICE int columns() const { return views + (queue > 0); }
  SK_HOST_DEVICE bool cross() const { return objective == Objective::CrossView; }
  // Whether rows of view u have negatives in column v (a view, or the queue).
  SK_HOST_DEVICE bool meets(int u, int v) const {
    if (v >= views) return true;
    return (core < 0 || u == v || u == core || v == core) && !(u == v && cross());
  }
  SK_HOST_DEVICE int limit(int v) const { return v >= views ? queue : batch; }
  SK_HOST_DEVICE bool owns(int sample) const { return first <= sample && sample < first + count; }
  // Whether tables and gradient are of some rows alone. With labels, where rows are sorted by class, a process's lie
  // among all others: it does the work of all.
  SK_HOST_DEVICE bool partial() const { return count < samples && !labels; }
  // The rows of a view for which the backward has memory, those of its own, padded: the first, and how many.
  SK_HOST_DEVICE int part_first() const { return own_block(padding) * padding; }
  SK_HOST_DEVICE int part_rows() const { return partial() ? own_blocks(padding) * padding : padded; }
  // The blocks of `side` rows that hold own rows of a view: the first of them, and how many.
  SK_HOST_DEVICE int own_block(int side) const { return partial() ? first / side : 0; }
  SK_HOST_DEVICE int own_blocks(int side) const {
    const int end = partial() ? first + count : batch;
    return (end + side - 1) / side - own_block(side);
  }
};

// `slope`, `shift` and `unit` are what `relative_exponential` takes.
struct Score {
  float scale, reference;
  float slope, shift, unit;
};

// Every score is at most reference + headroom, whatever the rows are: the bound is `scale` for unit rows (1 % more,
// since rows of few bits are not exactly of unit length), else `scale` times the largest squared norm.
//
// One rounding of scale * log2(e) moves all scores by 6e-8 of themselves: nothing for unit rows, whose scores are at
// most a few hundred, but much for rows of any length, which so are multiplied twice.
__device__ inline Score score_reference(const float* state, bool normalize) {
  const float scale = state[state_scale];
  const float bound = scale * (normalize ? 1.01f : state[state_norm]);
  const float reference = bound > headroom ? bound - headroom : 0.0f;
  if (normalize) return {scale, reference, scale * log2e, reference * log2e, 1.0f};
  return {scale, reference, scale, reference, log2e};
}

// exp(score - reference) of an inner product. Without a branch, at the price of a second product: the exponentials of a
// tile are then one block of code, in which the compiler can interleave them.
__device__ inline float relative_exponential(float product, Score score) {
  return exp2_approximate((product * score.slope - score.shift) * score.unit);
}

// The classes of stored rows, null without labels: the first row and the end of each row's class.
struct Classes {
  const int* begin = nullptr;
  const int* end = nullptr;
};

struct Stored {
  Tensor rows, rnorm, sums, state;
};

// stored <- unit rows, rnorm <- 1 / norm (negative where the floor was taken), sums <- 0.
Stored load_rows(
    const Device& device,
    const Problem& problem,
    const std::vector<Tensor>& views,
    const std::optional<Tensor>& queue,
    const int64_t* order,
    Number temperature,
    double eps);

// sums[c, i] += sum of exp(S_ij - reference) over the negatives j of row i in column c. `exact`: float32 products of
// float32's precision, else TF32.
void pair_sums(
    const Device& device,
    const Problem& problem,
    const Stored& stored,
    Classes classes,
    bool deterministic,
    bool exact);

// loss (user_views, count); weights (2, columns, rows): exp(logw + reference), and logw; coef.
struct Tables {
  Tensor loss, weights, coef;
};
Tables view_tables(const Device& device, const Problem& problem, const Stored& stored);
Tables class_tables(
    const Device& device, const Problem& problem, const Stored& stored, Classes classes, const int64_t* order);

// (splits [+ 1 for the queue], views * part_rows, stride): the sums over pairs of G_ij z_j, `factor` times too large.
struct Partial {
  Tensor sums;
  int splits;
};
struct Saved {
  const Tensor &rows, &rnorm, &weights, &coef, &state;
  const float* upstream;  // one number a row, or null
};
Partial gradient(
    const Device& device, const Problem& problem, const Saved& saved, Classes classes, float factor, bool exact);

// The gradient of the user's rows, in their order; `parts` (rows): of the temperature's, where it is wanted.
void finish_rows(
    const Device& device,
    const Problem& problem,
    const Saved& saved,
    const Partial& partial,
    const int64_t* order,
    Number grad,
    double constant,
    float factor,
    Tensor& out,
    double* parts);

__device__ inline double warp_sum(double x) {
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
  return x;
}
__device__ inline float warp_sum(float x) {
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
  return x;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

// Calls f with a value of the C++ type of a storage dtype.
template <typename F>
void by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "expected a float32, bfloat16 or float16 tensor");
  }
}

}  // namespace selfsup_kernels::cuda
