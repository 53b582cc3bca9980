// The six objectives, for one anchor: from N (log-sum-exp of its negatives in each view) and P (its positive in each
// view) to the loss and to the two coefficient tables of the backward. The same arithmetic for the host and the device.
//
//   logw[v]: d loss / d S_ij = exp(logw[v] + S_ij) for every negative j of view v;   coef[v]: d loss / d P_v.
//
// Views are numbered 0..V-1; column V of N and logw, where there is one, is the queue. `selfsup_kernels/info_nce/objectives.py`
// has the same numbers and the same rule for which views meet; `reference/info_nce.py` the same equations.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace selfsup_kernels {

enum class Objective : int { SupconOut = 0, SupconIn = 1, PerPositive = 2, Pairwise = 3, CrossView = 4, Decoupled = 5 };

struct ViewRule {
  Objective objective;
  int views;
  int core;    // negative: none
  int queues;  // 0 or 1

  SK_HOST_DEVICE int columns() const { return views + queues; }
  // Two different views meet unless there is a core view and neither is it.
  SK_HOST_DEVICE bool meets(int u, int v) const { return core < 0 || u == v || u == core || v == core; }
  SK_HOST_DEVICE bool positive(int u, int v) const { return u != v && meets(u, v); }
  SK_HOST_DEVICE bool negative(int u, int v) const {
    return meets(u, v) && !(u == v && objective == Objective::CrossView);
  }
  // Whether column c (a view, or the queue) holds negatives of an anchor of view u.
  SK_HOST_DEVICE bool uses(int u, int c) const { return c >= views || negative(u, c); }
  SK_HOST_DEVICE int positives(int u) const { return core < 0 || core == u ? views - 1 : 1; }
};

// log(exp(a) + exp(b)); -Inf is the empty sum; NaN stays.
SK_HOST_DEVICE inline double log_add(double a, double b) {
  if (a != a || b != b) return a + b;
  double high = a < b ? b : a, low = a < b ? a : b;
  if (high == -INFINITY || (high == INFINITY && low == high)) return high;
  return high + log1p(exp(low - high));
}
SK_HOST_DEVICE inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
// log(exp(rest) + exp(positive)) - positive; NaN, as that is, where the positive's score is infinite.
SK_HOST_DEVICE inline double log_ratio(double rest, double positive) {
  return positive == INFINITY ? NAN : softplus(rest - positive);
}
SK_HOST_DEVICE inline double sigmoid(double x) {
  double y = exp(x > 0 ? -x : x);
  return (x > 0 ? 1 : y) / (1 + y);
}

// Returns the anchor's loss; writes logw (columns()) and coef (views). u is the anchor's view.
SK_HOST_DEVICE inline double anchor_loss(
    ViewRule rule, int u, const double* n, const double* p, double* logw, double* coef) {
  const int views = rule.views, columns = rule.columns();
  const double count = rule.positives(u);
  const double log_count = log(count);
  for (int c = 0; c < columns; ++c) logw[c] = -INFINITY;
  for (int v = 0; v < views; ++v) coef[v] = 0;

  if (rule.objective == Objective::Pairwise || rule.objective == Objective::CrossView) {
    // Each positive view has its own denominator; columns beside it (own view, queue) are shared by all.
    double own = rule.objective == Objective::Pairwise ? n[u] : -INFINITY;
    double shared = rule.queues ? log_add(own, n[views]) : own;
    double loss = 0, total = -INFINITY;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      double rest = log_add(n[v], shared);
      logw[v] = -log_add(rest, p[v]) - log_count;
      total = log_add(total, logw[v]);
      coef[v] = -sigmoid(rest - p[v]) / count;
      loss += log_ratio(rest, p[v]);
    }
    if (rule.objective == Objective::Pairwise) logw[u] = total;
    if (rule.queues) logw[views] = total;
    return loss / count;
  }

  double rest = -INFINITY, inside = -INFINITY, sum = 0;
  for (int c = 0; c < columns; ++c)
    if (rule.uses(u, c)) rest = log_add(rest, n[c]);
  for (int v = 0; v < views; ++v) {
    if (!rule.positive(u, v)) continue;
    inside = log_add(inside, p[v]);
    sum += p[v];
  }

  double loss, weight;
  if (rule.objective == Objective::PerPositive) {
    loss = 0;
    weight = -INFINITY;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      weight = log_add(weight, -log_add(rest, p[v]) - log_count);
      coef[v] = -sigmoid(rest - p[v]) / count;
      loss += log_ratio(rest, p[v]) / count;
    }
  } else {
    double den = rule.objective == Objective::Decoupled ? rest : log_add(rest, inside);
    weight = den == -INFINITY ? -INFINITY : -den;
    // With one positive, den - p without the cancellation.
    if (rule.objective == Objective::SupconIn)
      loss = log_ratio(rest, inside) + log_count;
    else if (rule.objective == Objective::SupconOut && count == 1)
      loss = log_ratio(rest, inside);
    else
      loss = den - sum / count;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      if (rule.objective == Objective::Decoupled)
        coef[v] = -1 / count;
      else if (rule.objective == Objective::SupconIn)
        coef[v] = -exp(p[v] - inside) * sigmoid(rest - inside);
      else if (count == 1)
        coef[v] = -sigmoid(rest - inside);
      else
        coef[v] = exp(p[v] - den) - 1 / count;
    }
  }
  for (int c = 0; c < columns; ++c)
    if (rule.uses(u, c)) logw[c] = weight;
  return loss;
}

// ---- With labels: the positives of an anchor are the other rows of its class ----

// Over the scores x of an anchor's positives; `rest` is the log-sum-exp of its negatives.
struct ClassSums {
  double linear = 0;       // x (per_positive: softplus(rest - x))
  double share = 0;        // per_positive: sigmoid(rest - x)
  double top = -INFINITY;  // the largest x
  double exponential = 0;  // exp(x - top)
};

struct ClassAnchor {
  double loss;
  double logw;    // of every negative, as above
  double den;     // log-denominator
  double inside;  // log-sum-exp of the positives
  double share;   // 1 / positives
};

// An anchor that is alone in its class (`count` = 0) has loss 0 and pushes nothing away.
SK_HOST_DEVICE inline ClassAnchor class_anchor(Objective objective, double rest, const ClassSums& sums, double count) {
  const double inside = sums.top + log(sums.exponential);
  ClassAnchor a;
  a.inside = inside;
  a.den = objective == Objective::Decoupled ? rest : log_add(rest, inside);
  a.logw = -a.den;
  a.share = 1 / count;
  if (objective == Objective::SupconIn) {
    a.loss = log_ratio(rest, inside) + log(count);
  } else if (objective == Objective::PerPositive) {
    a.loss = sums.linear / count;
    // mean of exp(-Den_p), Den_p = log(e^rest + e^x): exp(-rest) times the mean of sigmoid(rest - x)
    a.logw = log(sums.share / count) - rest;
  } else {
    a.loss = a.den - sums.linear / count;
  }
  const bool no_negatives = rest == -INFINITY;
  if (no_negatives && (objective == Objective::PerPositive || objective == Objective::Decoupled)) a.logw = -INFINITY;
  if (count < 1) {
    a.loss = a.share = 0;
    a.logw = -INFINITY;
  }
  return a;
}

}  // namespace selfsup_kernels
