// The objectives for one anchor: compute the loss and the backward's two coefficient tables from N (the log-sum-exp of
// the anchor's negatives in each column) and P (its positive in each view).
//
//   log_weights[c]: d loss / d S_ij = exp(log_weights[c] + S_ij) for every negative j of column c;
//   positives[v]: d loss / d P_v.
//
// Views are numbered 0..V-1; column V of N and log_weights, if there is one, is the queue. `reference.py` of InfoNCE
// has the same equations; `objectives.py` explains the three fields of an objective.
#pragma once

#include <cmath>

#include "generated/call.h"

namespace selfsup_kernels {

// Which views are positives and negatives of each other.
struct ViewRule {
  Columns columns;
  Positives inside;
  Numerator numerator;
  int views;
  int core;    // negative: none
  int queues;  // 0 or 1

  int column_count() const { return views + queues; }  // of the tables
  // True if u == v, or there is no core view, or one of the two is the core view.
  bool meets(int u, int v) const { return core < 0 || u == v || u == core || v == core; }
  bool positive(int u, int v) const { return u != v && meets(u, v); }
  bool negative(int u, int v) const { return meets(u, v) && !(u == v && columns == Columns::OTHER); }
  // True if column c (a view, or the queue) holds negatives of an anchor of view u.
  bool uses(int u, int c) const { return c >= views || negative(u, c); }
  int positives(int u) const { return core < 0 || core == u ? views - 1 : 1; }
};

// log(exp(a) + exp(b)); -Inf is the empty sum; NaN stays.
inline double log_add(double a, double b) {
  if (a != a || b != b) return a + b;
  double high = a < b ? b : a, low = a < b ? a : b;
  if (high == -INFINITY || (high == INFINITY && low == high)) return high;
  return high + log1p(exp(low - high));
}
inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
// log(exp(rest) + exp(positive)) - positive; NaN, like that formula, if the positive's score is +Inf.
inline double log_ratio(double rest, double positive) { return positive == INFINITY ? NAN : softplus(rest - positive); }
inline double sigmoid(double x) {
  double y = exp(x > 0 ? -x : x);
  return (x > 0 ? 1 : y) / (1 + y);
}

// Returns the anchor's loss; writes log_weights (column_count()) and positives (views). u is the anchor's view.
// `several` (each positive view has its own denominator): N holds the positives too, and P is their mean; then the
// caller makes their derivatives.
inline double anchor_loss(
    ViewRule rule, int u, bool several, const double* n, const double* p, double* log_weights, double* positives) {
  const int views = rule.views, columns = rule.column_count();
  const double count = rule.positives(u);
  const double log_count = log(count);
  for (int c = 0; c < columns; ++c) log_weights[c] = -INFINITY;
  for (int v = 0; v < views; ++v) positives[v] = 0;

  if (rule.columns != Columns::ALL) {
    // Each positive view has its own denominator; the other columns in it (own view, queue) are shared by all.
    double own = rule.columns == Columns::OWN_AND_OTHER ? n[u] : -INFINITY;
    double shared = rule.queues ? log_add(own, n[views]) : own;
    double loss = 0, total = -INFINITY;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      double rest = log_add(n[v], shared);
      log_weights[v] = -(several ? rest : log_add(rest, p[v])) - log_count;
      total = log_add(total, log_weights[v]);
      positives[v] = several ? 0 : -sigmoid(rest - p[v]) / count;
      loss += several ? rest - p[v] : log_ratio(rest, p[v]);
    }
    if (rule.columns == Columns::OWN_AND_OTHER) log_weights[u] = total;
    if (rule.queues) log_weights[views] = total;
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

  if (rule.inside == Positives::NONE && rest == -INFINITY) return 0;  // no negatives: no loss and no gradient

  double loss, weight;
  if (rule.inside == Positives::ITSELF) {
    loss = 0;
    weight = -INFINITY;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      weight = log_add(weight, -log_add(rest, p[v]) - log_count);
      positives[v] = -sigmoid(rest - p[v]) / count;
      loss += log_ratio(rest, p[v]) / count;
    }
  } else {
    double den = rule.inside == Positives::NONE ? rest : log_add(rest, inside);
    weight = den == -INFINITY ? -INFINITY : -den;
    // With one positive, den - p without cancellation.
    if (rule.numerator == Numerator::LOG_SUM)
      loss = log_ratio(rest, inside) + log_count;
    else if (rule.inside == Positives::ALL && count == 1)
      loss = log_ratio(rest, inside);
    else
      loss = den - sum / count;
    for (int v = 0; v < views; ++v) {
      if (!rule.positive(u, v)) continue;
      if (rule.inside == Positives::NONE)
        positives[v] = -1 / count;
      else if (rule.numerator == Numerator::LOG_SUM)
        positives[v] = -exp(p[v] - inside) * sigmoid(rest - inside);
      else if (count == 1)
        positives[v] = -sigmoid(rest - inside);
      else
        positives[v] = exp(p[v] - den) - 1 / count;
    }
  }
  for (int c = 0; c < columns; ++c)
    if (rule.uses(u, c)) log_weights[c] = weight;
  return loss;
}

// ---- With labels: the positives of an anchor are the other rows of its class ----

// Sums over the scores x of an anchor's positives; `rest` is the log-sum-exp of its negatives.
struct ClassSums {
  double linear = 0;       // x (per_positive: softplus(rest - x))
  double share = 0;        // per_positive: sigmoid(rest - x)
  double top = -INFINITY;  // the largest x
  double exponential = 0;  // exp(x - top)
};

struct ClassAnchor {
  double loss;
  double log_weight;  // of every negative, as above
  // Parameters of the derivatives by its positives, see `Saved.positives`.
  double pivot, share, factor;
};

// An anchor that is alone in its class (`count` = 0) has loss 0 and no gradient.
inline ClassAnchor class_anchor(const Call& call, double rest, const ClassSums& sums, double count) {
  if (count < 1) return {0, -INFINITY, 0, 0, 0};
  const double inside = sums.top + log(sums.exponential);
  ClassAnchor a{0, 0, rest, 1 / count, 0};
  if (call.inside == static_cast<int64_t>(Positives::ITSELF)) {
    a.loss = sums.linear / count;
    // mean of exp(-Den_p), Den_p = log(e^rest + e^x): exp(-rest) times the mean of sigmoid(rest - x)
    a.log_weight = rest == -INFINITY ? -INFINITY : log(sums.share / count) - rest;
  } else if (call.inside == static_cast<int64_t>(Positives::NONE)) {
    if (rest == -INFINITY) return {0, -INFINITY, 0, 0, 0};  // no negatives
    a.loss = rest - sums.linear / count;
    a.log_weight = -rest;
  } else {
    const double den = log_add(rest, inside);
    a.log_weight = -den;
    if (call.numerator == static_cast<int64_t>(Numerator::LOG_SUM)) {
      a.loss = log_ratio(rest, inside) + log(count);
      a.pivot = inside;  // exp(x - den) - exp(x - inside), without cancellation
      a.factor = sigmoid(rest - inside);
    } else {
      a.loss = den - sums.linear / count;
      a.pivot = den;
      a.factor = 1;
    }
  }
  return a;
}

}  // namespace selfsup_kernels
