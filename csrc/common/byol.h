// BYOL's arithmetic on one row, the same for the host and the device. V is a number or a vector of numbers.
#pragma once

#include "common/macros.h"

namespace selfsup_kernels {

// 1 / max(norm, eps), negative where the floor was taken; at most the type's largest number. NaN stays NaN.
template <typename T>
SK_INLINE T signed_reciprocal(double norm, double eps) {
  constexpr double most = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
  double r = 1.0 / (norm < eps ? eps : norm);
  r = r > most ? most : r;
  return static_cast<T>(norm < eps ? -r : r);
}

// Of an anchor whose cosines with the other views' targets sum to `cosines`: the mean of 2 - 2 cos over them.
SK_INLINE double byol_loss(double cosines, double others) { return 2 - 2 * cosines / others; }
// What the loss multiplies that sum by.
SK_INLINE double byol_slope(double others) { return -2 / others; }

// An anchor's gradient, element by element: from the element of what it is compared with and its own.
template <typename T>
struct ByolGradient {
  T project, weight;

  // rp: signed reciprocal of the norm; weight: the upstream gradient times the slope.
  SK_INLINE ByolGradient(T rp, T cosines, T upstream)
      : project(rp < 0 ? T(0) : cosines * rp),  // below the floor the norm is a constant
        weight(upstream * (rp < 0 ? -rp : rp)) {}
  template <typename V>
  SK_INLINE V operator()(V opposite, V own) const {
    return (opposite - own * project) * weight;
  }
};

}  // namespace selfsup_kernels
