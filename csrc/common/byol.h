// BYOL's arithmetic on one row, shared by host and device. V is a scalar or a SIMD vector.
#pragma once

#include "common/macros.h"

namespace selfsup_kernels {

// 1 / max(norm, eps), negated if norm < eps, clamped to the type's largest finite number. NaN stays NaN.
template <typename T>
SK_INLINE T signed_reciprocal(double norm, double eps) {
  constexpr double most = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
  double r = 1.0 / (norm < eps ? eps : norm);
  r = r > most ? most : r;
  return static_cast<T>(norm < eps ? -r : r);
}

// An anchor's loss: the mean of 2 - 2 cos over the targets of the `others` other views. `cosines` is their sum.
SK_INLINE double byol_loss(double cosines, double others) { return 2 - 2 * cosines / others; }
// The derivative of byol_loss by `cosines`.
SK_INLINE double byol_slope(double others) { return -2 / others; }

// One element of an anchor's gradient, from the element it is compared with (`opposite`) and its own.
template <typename T>
struct ByolGradient {
  T project, weight;

  // rp: signed reciprocal of the norm; upstream: the upstream gradient times the slope.
  SK_INLINE ByolGradient(T rp, T cosines, T upstream)
      : project(rp < 0 ? T(0) : cosines * rp),  // below eps the norm is a constant
        weight(upstream * (rp < 0 ? -rp : rp)) {}
  template <typename V>
  SK_INLINE V operator()(V opposite, V own) const {
    return (opposite - own * project) * weight;
  }
};

}  // namespace selfsup_kernels
