// One-element optimizer steps and the moving average that follows them, shared by host and device.
//
// A is the arithmetic type: double for double parameters, else float. The operations have the order of torch.optim
// (`torch/optim/sgd.py`, `adam.py`).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/ema.h"
#include "common/rounding.h"

namespace selfsup_kernels {

template <typename T>
using ArithmeticOf = std::conditional_t<sizeof(T) == 8, double, float>;

// first: the momentum buffer is new; it is set to the gradient without being read.
struct SgdSettings {
  double weight_decay, momentum, dampening;
  bool nesterov, maximize, first;
};

// g <- grad + weight_decay p, times `scale` (LARS);  b <- momentum b + (1 - dampening) g;  p <- p - lr b, or with
// Nesterov momentum p - lr (g + momentum b). Without states p <- p - lr g. With weight_decay = 0, an infinite p adds no
// NaN to g.
template <int states_>
struct Sgd {
  static constexpr int states = states_;
  using Settings = SgdSettings;

  template <typename A>
  struct Step {
    A lr, scale, decay, momentum, fresh, sign;
    bool nesterov, first;

    SK_HOST_DEVICE Step(const Settings& s, double lr, double scale)
        : lr(static_cast<A>(lr)),
          scale(static_cast<A>(scale)),
          decay(static_cast<A>(s.weight_decay)),
          momentum(static_cast<A>(s.momentum)),
          fresh(static_cast<A>(1 - s.dampening)),
          sign(s.maximize ? A(-1) : A(1)),
          nesterov(s.nesterov),
          first(s.first) {}

    SK_INLINE A operator()(A p, A g, A* state) const {
      const A slope = sign * g, decayed = slope + decay * p;
      g = (decay == A(0) ? slope : decayed) * scale;
      if constexpr (states == 1) {
        const A buffer = first ? g : momentum * state[0] + fresh * g;
        state[0] = buffer;
        g = nesterov ? g + momentum * buffer : buffer;
      }
      return p - lr * g;
    }
  };
};

// unbias1 = 1 / (1 - beta1^k), unbias2 = 1 / sqrt(1 - beta2^k) at step k.
struct AdamwSettings {
  double weight_decay, beta1, beta2, eps, unbias1, unbias2;
  bool maximize;
};

// p <- p - lr weight_decay p;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
// p <- p - lr unbias1 m / (unbias2 sqrt(v) + eps).
struct Adamw {
  static constexpr int states = 2;
  using Settings = AdamwSettings;

  template <typename A>
  struct Step {
    A keep, lr, weight1, beta2, weight2, unbias2, eps, sign;

    // `scale` is for LARS and is not used here.
    SK_HOST_DEVICE Step(const Settings& s, double lr, double)
        : keep(static_cast<A>(1 - lr * s.weight_decay)),
          lr(static_cast<A>(lr * s.unbias1)),
          weight1(static_cast<A>(1 - s.beta1)),
          beta2(static_cast<A>(s.beta2)),
          weight2(static_cast<A>(1 - s.beta2)),
          unbias2(static_cast<A>(s.unbias2)),
          eps(static_cast<A>(s.eps)),
          sign(s.maximize ? A(-1) : A(1)) {}

    SK_INLINE A operator()(A p, A g, A* state) const {
      g = sign * g;
      state[0] = lerp<A, A>(state[0], g, weight1);
      state[1] = beta2 * state[1] + weight2 * g * g;
      return keep * p - lr * (state[0] / (unbias2 * std::sqrt(state[1]) + eps));
    }
  };
};

// The moving average of a target and the stored parameter, in the target's arithmetic type.
template <typename T, typename P>
SK_INLINE ArithmeticOf<T> averaged(T target, P source, ArithmeticOf<T> weight) {
  using A = ArithmeticOf<T>;
  return average<A, A>(static_cast<A>(target), static_cast<A>(source), weight);
}

}  // namespace selfsup_kernels
