// The kernels on rows of features: norms, the end of the InfoNCE gradient, BYOL, storage types. Included by
// kernels_impl.h; see simd.h for the rules.
#pragma once

#include "common/byol.h"
#include "cpu/simd_half.h"
#include "cpu/simd_part.h"

namespace selfsup_kernels::SK_ARCH {

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

template <typename T>
inline T magnitude(T x) {
  return x < 0 ? -x : x;
}

// 1 / max(|h|, eps), negated if |h| < eps.
template <typename T>
inline T reciprocal_norm(const T* h, int64_t d, double eps) {
  return signed_reciprocal<T>(__builtin_sqrt(square_norm(h, d)), eps);
}

// <ra a, rb b>, scaled before multiplying: products of very long or very short rows would leave the type's range.
template <typename T>
inline T scaled_dot(const T* a, T ra, const T* b, T rb, int64_t d) {
  constexpr int W = lanes<T>;
  Vec<T> total[2] = {};
  int64_t j = 0;
  for (; j + 2 * W <= d; j += 2 * W)
    for (int k = 0; k < 2; ++k) total[k] += (load<T>(a + j + k * W) * ra) * (load<T>(b + j + k * W) * rb);
  for (; j + W <= d; j += W) total[0] += (load<T>(a + j) * ra) * (load<T>(b + j) * rb);
  if (j < d) total[0] += (load_part<T>(a + j, d - j, 0) * ra) * (load_part<T>(b + j, d - j, 0) * rb);
  return sum<T>(total[0] + total[1]);
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

// sum <- the sum of all unit targets. A view subtracts its own to get the sum over the other views.
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

// True if the squared norm of a row shows that sums of products of its elements stay in the type's range.
template <typename T>
inline bool ordinary(double square) {
  constexpr bool wide = sizeof(T) == 8;
  return square > (wide ? 1e-290 : 1e-30) && square < (wide ? 1e300 : 1e38);
}

// <a, a>, <b, b> and <a, b> in one pass, summed in T over parts of 512 elements and in double over the parts.
template <typename T>
struct Products {
  double aa = 0, bb = 0, ab = 0;

  Products(const T* a, const T* b, int64_t d) {
    constexpr int W = lanes<T>;
    for (int64_t begin = 0; begin < d; begin += 512) {
      const int64_t end = d - begin < 512 ? d : begin + 512;
      Vec<T> sums[2][3] = {};  // two chains of each, six in all, hide the latency of the additions
      auto add = [&](Vec<T> x, Vec<T> y, int chain) {
        sums[chain][0] += x * x;
        sums[chain][1] += y * y;
        sums[chain][2] += x * y;
      };
      int64_t j = begin;
      for (; j + 2 * W <= end; j += 2 * W)
        for (int k = 0; k < 2; ++k) add(load<T>(a + j + k * W), load<T>(b + j + k * W), k);
      for (; j + W <= end; j += W) add(load<T>(a + j), load<T>(b + j), 0);
      if (j < end) add(load_part<T>(a + j, end - j, 0), load_part<T>(b + j, end - j, 0), 0);
      aa += sum<T>(sums[0][0] + sums[1][0]);
      bb += sum<T>(sums[0][1] + sums[1][1]);
      ab += sum<T>(sums[0][2] + sums[1][2]);
    }
  }
};

// The cosine of p and t, and the signed reciprocals of their norms.
template <typename T>
inline T cosine(const T* p, const T* t, int64_t d, double eps, T& rp, T& rt) {
  const Products<T> all(p, t, d);
  if (ordinary<T>(all.aa) && ordinary<T>(all.bb)) {
    rp = signed_reciprocal<T>(__builtin_sqrt(all.aa), eps);
    rt = signed_reciprocal<T>(__builtin_sqrt(all.bb), eps);
    return static_cast<T>(all.ab * magnitude(rp) * magnitude(rt));
  }
  rp = reciprocal_norm<T>(p, d, eps);
  rt = reciprocal_norm<T>(t, d, eps);
  return scaled_dot<T>(p, magnitude(rp), t, magnitude(rt), d);
}

template <typename T>
void byol_forward(
    const T* const* p, const T* const* t, int64_t views, int64_t d, double eps, T* sum, T* rp, T* rt, T* cosines) {
  if (views <= 2) {
    for (int64_t v = 0; v < views; ++v) {
      int64_t other = views - 1 - v;  // with one view, the view itself
      cosines[v] = cosine<T>(p[v], t[other], d, eps, rp[v], rt[other]);
    }
    return;
  }
  for (int64_t v = 0; v < views; ++v) {
    rp[v] = reciprocal_norm<T>(p[v], d, eps);
    rt[v] = reciprocal_norm<T>(t[v], d, eps);
  }
  sum_targets<T>(t, rt, views, d, sum);
  for (int64_t v = 0; v < views; ++v)
    cosines[v] = scaled_dot<T>(p[v], magnitude(rp[v]), sum, T(1), d) -
                 scaled_dot<T>(p[v], magnitude(rp[v]), t[v], magnitude(rt[v]), d);
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
    const ByolGradient<T> gradient(rp[v], cosines[v], weight[v]);
    const T* own = p[v];
    if (views <= 2) {
      const T* other = t[views - 1 - v];
      T r = magnitude(rt[views - 1 - v]);
      map_row<T>(dp[v], d, [=](Vec<T>, auto at) { return gradient(at(other) * r, at(own)); });
    } else {
      const T* target = t[v];
      T r = magnitude(rt[v]);
      map_row<T>(dp[v], d, [=](Vec<T>, auto at) { return gradient(at(sum) - at(target) * r, at(own)); });
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

}  // namespace selfsup_kernels::SK_ARCH
