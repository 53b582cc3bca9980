// The kernels themselves. Included by each kernels_<capability>.cpp; see simd.h for the rules.
#pragma once

#include "cpu/simd.h"
#include "cpu/simd_half.h"

namespace selfsup_kernels::SK_ARCH {

// A vector whose first n lanes are p[0..n), the others `fill`.
template <typename T>
inline Vec<T> load_part(const T* p, int64_t n, T fill) {
  T lane[lanes<T>];
  for (T& x : lane) x = fill;
  std::memcpy(lane, p, n * sizeof(T));
  return load<T>(lane);
}

template <typename T>
inline void store_part(T* p, int64_t n, Vec<T> v) {
  std::memcpy(p, &v, n * sizeof(T));
}

template <typename T>
constexpr T infinity = static_cast<T>(__builtin_inf());

// ---------------------------------------------------------------- InfoNCE tiles

template <typename T, int R>
inline void exp_sums_rows(const T* s, int64_t ld, int64_t cols, T scale, T ref, double* row_sum, T* col_sum) {
  constexpr int W = lanes<T>;
  Vec<T> total[R] = {};
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    Vec<T> column{};
    for (int r = 0; r < R; ++r) {
      Vec<T> e = exp(load<T>(s + r * ld + j) * scale - ref);
      total[r] += e;
      column += e;
    }
    if (col_sum) store<T>(col_sum + j, load<T>(col_sum + j) + column);
  }
  if (j < cols) {
    Vec<T> column{};
    for (int r = 0; r < R; ++r) {
      Vec<T> e = exp(load_part<T>(s + r * ld + j, cols - j, -infinity<T>) * scale - ref);
      total[r] += e;
      column += e;
    }
    if (col_sum) store_part<T>(col_sum + j, cols - j, load_part<T>(col_sum + j, cols - j, 0) + column);
  }
  for (int r = 0; r < R; ++r) row_sum[r] += sum<T>(total[r]);
}

template <typename T>
void exp_sums(const T* s, int64_t ld, int64_t rows, int64_t cols, T scale, T ref, double* row_sum, T* col_sum) {
  // Four rows share one pass over the column sums.
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) exp_sums_rows<T, 4>(s + i * ld, ld, cols, scale, ref, row_sum + i, col_sum);
  for (; i < rows; ++i) exp_sums_rows<T, 1>(s + i * ld, ld, cols, scale, ref, row_sum + i, col_sum);
}

// row[j] <- f(vector of row[j...], j, count) over a row, its last vector part-filled with zeros.
template <typename T, typename F>
inline void map_row(T* row, int64_t n, F f) {
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store<T>(row + j, f(load<T>(row + j), [j](const T* p) { return load<T>(p + j); }));
  if (j < n) {
    int64_t rest = n - j;
    store_part<T>(row + j, rest, f(load_part<T>(row + j, rest, 0), [j, rest](const T* p) {
                    return load_part<T>(p + j, rest, 0);
                  }));
  }
}

template <typename T>
void exp_gradient(
    T* s,
    int64_t ld,
    T* turned,
    int64_t turned_ld,
    int64_t rows,
    int64_t cols,
    T scale,
    T ref,
    const T* row_weight,
    const T* col_weight) {
  constexpr int W = lanes<T>;
  auto one_row = [=](int64_t i, int64_t from) {
    T weight = row_weight[i];
    const T* columns = col_weight + from;
    map_row<T>(s + i * ld + from, cols - from, [=](Vec<T> x, auto at) {
      return exp(x * scale - ref) * (at(columns) + weight);
    });
  };
  if (!turned) {
    for (int64_t i = 0; i < rows; ++i) one_row(i, 0);
    return;
  }
  // Squares of W x W go through the registers once for both results.
  const int64_t whole_rows = rows / W * W, whole_cols = cols / W * W;
  for (int64_t i = 0; i < whole_rows; i += W) {
    for (int64_t j = 0; j < whole_cols; j += W) {
      Vec<T> square[W], columns = load<T>(col_weight + j);
      for (int r = 0; r < W; ++r) {
        square[r] = exp(load<T>(s + (i + r) * ld + j) * scale - ref) * (columns + row_weight[i + r]);
        store<T>(s + (i + r) * ld + j, square[r]);
      }
      transpose<T>(square);
      for (int c = 0; c < W; ++c) store<T>(turned + (j + c) * turned_ld + i, square[c]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t from = i < whole_rows ? whole_cols : 0;
    if (from == cols) continue;
    one_row(i, from);
    for (int64_t j = from; j < cols; ++j) turned[j * turned_ld + i] = s[i * ld + j];
  }
}

template <typename T>
void exp_rows(T* s, int64_t ld, int64_t rows, int64_t cols, T scale, const T* row_ref, const T* row_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    T weight = row_weight[i], ref = row_ref[i];
    map_row<T>(s + i * ld, cols, [=](Vec<T> x, auto) { return exp(x * scale - ref) * weight; });
  }
}

template <typename T>
T row_max(const T* row, int64_t n) {
  constexpr int W = lanes<T>;
  Vec<T> top = broadcast<T>(-infinity<T>);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    Vec<T> x = load<T>(row + j);
    top = select<T>(x > top, x, top);
  }
  T lane[W], result = -infinity<T>;
  store<T>(lane, top);
  for (T x : lane) result = x > result ? x : result;
  for (; j < n; ++j) result = row[j] > result ? row[j] : result;
  return result;
}

// ---------------------------------------------------------------- InfoNCE with labels

// f(vector of the row, its valid lanes as a mask of ones and zeros) over a row.
template <typename T, typename F>
inline void visit_row(const T* row, int64_t n, F f) {
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(load<T>(row + j), ~IntVec<T>{});
  if (j < n) {
    T one[W] = {};
    for (int64_t k = 0; k < n - j; ++k) one[k] = 1;
    f(load_part<T>(row + j, n - j, 0), (IntVec<T>)(load<T>(one) > T(0)));
  }
}

template <typename T>
void label_sums(const T* row, int64_t n, T scale, T ref, double* sums) {
  Vec<T> linear{}, exponential{};
  visit_row<T>(row, n, [&](Vec<T> s, IntVec<T> valid) {
    Vec<T> x = s * scale;
    linear += select<T>(valid, x, Vec<T>{});
    exponential += select<T>(valid, exp(x - ref), Vec<T>{});
  });
  sums[0] += sum<T>(linear);
  sums[1] += sum<T>(exponential);
}

// log(1 + y) for 0 <= y <= 1 with a small relative error at small y too: the rounding of 1 + y is divided out.
template <typename T>
inline Vec<T> log_plus_one(Vec<T> y) {
  Vec<T> u = y + T(1);
  Vec<T> rounded = u - T(1);
  IntVec<T> tiny = (IntVec<T>)(rounded == T(0));
  return select<T>(tiny, y, log(u) * y / select<T>(tiny, u, rounded));
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  Vec<T> y = exp(select<T>((IntVec<T>)(x > T(0)), -x, x));
  return select<T>((IntVec<T>)(x > T(0)), broadcast<T>(1), y) / (y + T(1));
}

template <typename T>
void label_softplus(const T* row, int64_t n, T scale, T negatives, double* sums) {
  Vec<T> soft{}, share{};
  visit_row<T>(row, n, [&](Vec<T> s, IntVec<T> valid) {
    Vec<T> d = negatives - s * scale;
    IntVec<T> above = (IntVec<T>)(d > T(0));
    Vec<T> y = exp(select<T>(above, -d, d));
    Vec<T> softplus = log_plus_one<T>(y) + select<T>(above, d, Vec<T>{});
    soft += select<T>(valid, softplus, Vec<T>{});
    share += select<T>(valid, sigmoid<T>(d), Vec<T>{});
  });
  sums[0] += sum<T>(soft);
  sums[1] += sum<T>(share);
}

template <typename T, LabelObjective O>
inline Vec<T> label_coefficient(Vec<T> x, Vec<T> weight, Vec<T> share, Vec<T> ref) {
  if constexpr (O == LabelObjective::SupconOut) return weight * exp(x - ref) - share;
  if constexpr (O == LabelObjective::SupconIn) return -weight * exp(x - ref);
  if constexpr (O == LabelObjective::PerPositive) return -share * sigmoid<T>(ref - x);
  return -share;
}

template <typename T, LabelObjective O>
void label_gradient_of(T* s, int64_t ld, int64_t rows, int64_t cols, T scale, LabelRow<T> row, LabelRow<T> col) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> weight = broadcast<T>(row.weight[i]), share = broadcast<T>(row.share[i]), ref = broadcast<T>(row.ref[i]);
    map_row<T>(s + i * ld, cols, [=](Vec<T> x, auto at) {
      x *= scale;
      return label_coefficient<T, O>(x, weight, share, ref) +
             label_coefficient<T, O>(x, at(col.weight), at(col.share), at(col.ref));
    });
  }
}

template <typename T>
void label_gradient(
    T* s, int64_t ld, int64_t rows, int64_t cols, T scale, LabelObjective objective, LabelRow<T> row, LabelRow<T> col) {
  using O = LabelObjective;
  switch (objective) {
    case O::SupconOut:
      return label_gradient_of<T, O::SupconOut>(s, ld, rows, cols, scale, row, col);
    case O::SupconIn:
      return label_gradient_of<T, O::SupconIn>(s, ld, rows, cols, scale, row, col);
    case O::PerPositive:
      return label_gradient_of<T, O::PerPositive>(s, ld, rows, cols, scale, row, col);
    case O::Decoupled:
      return label_gradient_of<T, O::Decoupled>(s, ld, rows, cols, scale, row, col);
  }
}

// ---------------------------------------------------------------- rows

template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  constexpr int W = lanes<T>;
  Vec<T> total[4] = {};  // four chains hide the latency of the additions
  int64_t j = 0;
  for (; j + 4 * W <= d; j += 4 * W)
    for (int k = 0; k < 4; ++k) total[k] += load<T>(a + j + k * W) * load<T>(b + j + k * W);
  for (; j + W <= d; j += W) total[0] += load<T>(a + j) * load<T>(b + j);
  if (j < d) total[0] += load_part<T>(a + j, d - j, 0) * load_part<T>(b + j, d - j, 0);
  return sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

// |h|^2 in double: squares of large float32 numbers must not overflow.
inline double square_norm(const double* h, int64_t d) { return dot<double>(h, h, d); }
inline double square_norm(const float* h, int64_t d) {
  double total = 0;
  for (int64_t j = 0; j < d; j += 512) {
    int64_t n = d - j < 512 ? d - j : 512;
    float part = dot<float>(h + j, h + j, n);
    if (!(part < 1e38f && part > 1e-30f)) {
      part = 0;
      for (int64_t k = 0; k < n; ++k) total += double(h[j + k]) * double(h[j + k]);
    }
    total += part;
  }
  return total;
}

// 1 / max(|h|, eps), negative where the floor was taken. NaN stays NaN.
template <typename T>
inline T reciprocal_norm(const T* h, int64_t d, double eps) {
  double norm = __builtin_sqrt(square_norm(h, d));
  return static_cast<T>(norm < eps ? -1.0 / eps : 1.0 / norm);
}

template <typename T>
inline T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <typename T>
T unit_row(const T* h, int64_t d, double eps, T* z) {
  T r = reciprocal_norm<T>(h, d, eps);
  T size = magnitude(r);
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= d; j += W) store<T>(z + j, load<T>(h + j) * size);
  for (; j < d; ++j) z[j] = h[j] * size;
  return r;
}

template <typename T>
void add_scaled(T* y, const T* x, T a, int64_t d) {
  map_row<T>(y, d, [=](Vec<T> v, auto at) { return v + at(x) * a; });
}

template <typename T>
T finish_row(const T* z, T* dz, int64_t d, T scale, T rnorm) {
  T along = dot<T>(z, dz, d) * scale;
  if (rnorm == 0) {
    map_row<T>(dz, d, [=](Vec<T> g, auto) { return g * scale; });
  } else {
    T size = magnitude(rnorm);
    T project = rnorm < 0 ? T(0) : along;
    map_row<T>(dz, d, [=](Vec<T> g, auto at) { return (g * scale - at(z) * project) * size; });
  }
  return along;
}

// ---------------------------------------------------------------- BYOL

// The sum of the other views' unit targets is `sum - own`; with one view (pairs) a row meets its own target.
template <typename T>
inline void sum_targets(const T* const* t, const T* rt, int64_t views, int64_t d, T* sum) {
  for (int64_t v = 0; v < views; ++v) {
    T r = magnitude(rt[v]);
    if (v == 0)
      map_row<T>(sum, d, [=](Vec<T>, auto at) { return at(t[0]) * r; });
    else
      add_scaled<T>(sum, t[v], r, d);
  }
}

template <typename T>
void byol_forward(
    const T* const* p, const T* const* t, int64_t views, int64_t d, double eps, T* sum, T* rp, T* rt, T* cosines) {
  for (int64_t v = 0; v < views; ++v) {
    rp[v] = reciprocal_norm<T>(p[v], d, eps);
    rt[v] = reciprocal_norm<T>(t[v], d, eps);
  }
  if (views <= 2) {
    for (int64_t v = 0; v < views; ++v) {
      int64_t other = views - 1 - v;
      cosines[v] = dot<T>(p[v], t[other], d) * magnitude(rp[v]) * magnitude(rt[other]);
    }
    return;
  }
  sum_targets<T>(t, rt, views, d, sum);
  for (int64_t v = 0; v < views; ++v)
    cosines[v] = (dot<T>(p[v], sum, d) - dot<T>(p[v], t[v], d) * magnitude(rt[v])) * magnitude(rp[v]);
}

template <typename T>
void byol_backward(
    const T* const* p,
    const T* const* t,
    int64_t views,
    int64_t d,
    const T* rp,
    const T* rt,
    const T* cosines,
    const T* weight,
    T* sum,
    T* const* dp) {
  if (views > 2) sum_targets<T>(t, rt, views, d, sum);
  for (int64_t v = 0; v < views; ++v) {
    T size = magnitude(rp[v]);
    T project = rp[v] < 0 ? T(0) : cosines[v] * size;  // below the floor the norm is a constant
    T w = weight[v] * size;
    const T* own = p[v];
    if (views <= 2) {
      const T* other = t[views - 1 - v];
      T r = magnitude(rt[views - 1 - v]);
      map_row<T>(dp[v], d, [=](Vec<T>, auto at) { return (at(other) * r - at(own) * project) * w; });
    } else {
      const T* target = t[v];
      T r = magnitude(rt[v]);
      map_row<T>(dp[v], d, [=](Vec<T>, auto at) { return (at(sum) - at(target) * r - at(own) * project) * w; });
    }
  }
}

// ---------------------------------------------------------------- storage

template <typename S, typename T>
inline void widen_as(const void* from, int64_t n, T* to) {
  const S* p = static_cast<const S*>(from);
  constexpr int W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store<T>(to + j, load_as<T>(p + j));
  if (j < n) {
    S part[W] = {};
    std::memcpy(part, p + j, (n - j) * sizeof(S));
    store_part<T>(to + j, n - j, load_as<T>(part));
  }
}

template <typename T>
void widen(const void* from, Storage storage, int64_t n, T* to) {
  if constexpr (sizeof(T) == sizeof(double)) {
    std::memcpy(to, from, n * sizeof(T));  // float64 is only ever stored as itself
  } else {
    if (storage == Storage::BFloat16) return widen_as<BFloat16, T>(from, n, to);
    if (storage == Storage::Float16) return widen_as<Float16, T>(from, n, to);
    std::memcpy(to, from, n * sizeof(T));
  }
}

template <typename S>
inline void narrow_as(const float* from, int64_t n, float limit, void* to) {
  S* p = static_cast<S*>(to);
  constexpr int W = lanes<float>;
  auto clamp = [limit](Vec<float> x) {
    x = select<float>(x > limit, broadcast<float>(limit), x);
    return select<float>(x < -limit, broadcast<float>(-limit), x);
  };
  int64_t j = 0;
  for (; j + W <= n; j += W) store_as(p + j, clamp(load<float>(from + j)));
  if (j < n) {
    S part[W];
    store_as(part, clamp(load_part<float>(from + j, n - j, 0)));
    std::memcpy(p + j, part, (n - j) * sizeof(S));
  }
}

template <typename T>
void narrow(const T* from, int64_t n, bool saturate, void* to, Storage storage) {
  if constexpr (sizeof(T) == sizeof(double)) {
    std::memcpy(to, from, n * sizeof(T));
  } else {
    if (storage == Storage::BFloat16) return narrow_as<BFloat16>(from, n, infinity<float>, to);
    if (storage == Storage::Float16) return narrow_as<Float16>(from, n, saturate ? 65504.0f : infinity<float>, to);
    std::memcpy(to, from, n * sizeof(T));
  }
}

// ---------------------------------------------------------------- EMA

// 32 random bits for each lane's element number: an integer hash (C. Wellons' "lowbias32" construction), keyed twice.
inline FloatBits hash(FloatBits x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  return x ^ (x >> 15);
}

inline FloatBits random_bits(int64_t seed, uint32_t stream, uint64_t element) {
  FloatBits index{};
  for (int k = 0; k < lanes<float>; ++k) index[k] = static_cast<uint32_t>(element + k);
  uint32_t key = stream * 0x9e3779b9u ^ static_cast<uint32_t>(seed);
  uint32_t high = static_cast<uint32_t>(element >> 32) * 0x85ebca6bu ^ static_cast<uint32_t>(uint64_t(seed) >> 32);
  return hash(hash(index + key) + hash(FloatBits{} + high));
}

// t + w (s - t), from whichever end is nearer, so that w = 0 and w = 1 give t and s exactly (as torch.lerp does).
template <typename T>
inline Vec<T> lerp(Vec<T> t, Vec<T> s, T w) {
  return w < T(0.5) ? t + (s - t) * w : s - (s - t) * (T(1) - w);
}

template <typename Target, typename A>
inline void store_target(Target* p, Vec<A> v, const int64_t* seed, uint32_t stream, uint64_t element) {
  if constexpr (sizeof(Target) == 2) {
    if (seed) return store_stochastically(p, v, random_bits(*seed, stream, element));
  }
  store_as(p, v);
}

// The source as a vector of the arithmetic type; a float64 on either side makes that double.
template <typename A, typename S>
inline Vec<A> load_source(const S* p) {
  if constexpr (sizeof(A) == sizeof(S) || (sizeof(A) == 4 && sizeof(S) == 2)) {
    return load_as<A>(p);
  } else if constexpr (sizeof(S) == 8) {
    Vec<A> v;
    for (int k = 0; k < lanes<A>; ++k) v[k] = static_cast<A>(p[k]);
    return v;
  } else {
    float wide[lanes<float>];
    if constexpr (sizeof(S) == 4) {
      std::memcpy(wide, p, lanes<A> * sizeof(float));
    } else {
      S part[lanes<float>] = {};
      std::memcpy(part, p, lanes<A> * sizeof(S));
      store<float>(wide, load_as<float>(part));
    }
    Vec<A> v;
    for (int k = 0; k < lanes<A>; ++k) v[k] = wide[k];
    return v;
  }
}

template <typename Target, typename Source>
void ema_span(
    void* target, const void* source, int64_t n, double weight, const int64_t* seed, uint32_t stream, uint64_t offset) {
  using A = std::conditional_t<sizeof(Target) == 8, double, float>;
  constexpr int W = lanes<A>;
  Target* t = static_cast<Target*>(target);
  const Source* s = static_cast<const Source*>(source);
  A w = static_cast<A>(weight);
  int64_t j = 0;
  for (; j + W <= n; j += W)
    store_target<Target, A>(t + j, lerp<A>(load_as<A>(t + j), load_source<A>(s + j), w), seed, stream, offset + j);
  if (j < n) {
    Target old[W] = {};
    Source now[W] = {};
    std::memcpy(old, t + j, (n - j) * sizeof(Target));
    std::memcpy(now, s + j, (n - j) * sizeof(Source));
    store_target<Target, A>(old, lerp<A>(load_as<A>(old), load_source<A>(now), w), seed, stream, offset + j);
    std::memcpy(t + j, old, (n - j) * sizeof(Target));
  }
}

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {
      exp_sums<T>,
      exp_gradient<T>,
      exp_rows<T>,
      row_max<T>,
      label_sums<T>,
      label_softplus<T>,
      label_gradient<T>,
      unit_row<T>,
      dot<T>,
      add_scaled<T>,
      finish_row<T>,
      byol_forward<T>,
      byol_backward<T>,
      widen<T>,
      narrow<T>};
}

#define SK_EMA_ROW(Target) \
  {ema_span<Target, float>, ema_span<Target, double>, ema_span<Target, BFloat16>, ema_span<Target, Float16>}

}  // namespace selfsup_kernels::SK_ARCH

namespace selfsup_kernels {

using namespace SK_ARCH;

const KernelTable SK_TABLE = {
    SK_NAME,
    make_kernels<float>(),
    make_kernels<double>(),
    {SK_EMA_ROW(float), SK_EMA_ROW(double), SK_EMA_ROW(BFloat16), SK_EMA_ROW(Float16)}};

}  // namespace selfsup_kernels
