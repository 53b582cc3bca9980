"""The arithmetic of the objectives for a block of anchors, as in ``csrc/cpu/objectives.h``.

From N (log-sum-exp of the negatives in each column) and P (the positive in each view), both (anchors, columns) in
float64, to the loss and the two tables of the backward, log_weights and positives. The queue is column views.
"""

import triton
import triton.language as tl

from selfsup_kernels.info_nce.objectives import Columns, Numerator, Positives
from selfsup_kernels.tiles.kernels.tile import log_add, log_ratio, log_sum_exp, negatives_meet, sigmoid

ALL, OWN_AND_OTHER = tl.constexpr(int(Columns.ALL)), tl.constexpr(int(Columns.OWN_AND_OTHER))
ALL_INSIDE, ITSELF, NONE_INSIDE = (tl.constexpr(int(x)) for x in (Positives.ALL, Positives.ITSELF, Positives.NONE))
MEAN, LOG_SUM = tl.constexpr(int(Numerator.MEAN)), tl.constexpr(int(Numerator.LOG_SUM))


@triton.jit
def anchor_tables(n, p, several, mean, u, column, core_view, views, has_queue, rules: tl.constexpr):
    """(loss, log_weights, positives) of anchors of view ``u``; ``column`` numbers the last axis of ``n`` and ``p``.

    If ``rules.crossed``, ``several`` are the anchors whose class has other samples: N has all rows of a view, and
    ``mean`` (anchors, columns) is that of the positives' scores."""
    is_view = column < views
    meets = negatives_meet(u, column, False, core_view, ALL)
    positive = (is_view & (column != u) & meets)[None, :]
    is_queue = (column == views) & has_queue
    is_own = column == u
    none = float("-inf")
    count = tl.where((core_view < 0) | (u == core_view), views - 1, 1).to(tl.float64)
    log_count = tl.log(count)
    p = tl.where(positive, p, 0.0)  # elsewhere it is not used, and must not be NaN

    if rules.columns != ALL:
        # Each positive view has its own denominator. All of them share the queue and, if used, the anchor's own view.
        shared = is_queue
        if rules.columns == OWN_AND_OTHER:
            shared = shared | is_own
        common = log_sum_exp(n, shared[None, :])
        rest = log_add(n, common[:, None])
        each = -log_add(rest, p) - log_count
        terms = log_ratio(rest, p)
        positives = tl.where(positive, -sigmoid(rest - p) / count, 0.0)
        if rules.crossed:
            each = tl.where(several[:, None], -rest - log_count, each)
            terms = tl.where(several[:, None], rest - mean, terms)
            positives = tl.where(several[:, None], 0.0, positives)
        loss = tl.sum(tl.where(positive, terms, 0.0), 1) / count
        total = log_sum_exp(each, positive)
        log_weights = tl.where(positive, each, tl.where(shared[None, :], total[:, None], none))
        return loss, log_weights, positives

    used = (is_view & meets) | is_queue
    rest = log_sum_exp(n, used[None, :])
    if rules.inside == ITSELF:
        wide = rest[:, None]
        loss = tl.sum(tl.where(positive, log_ratio(wide, p), 0.0), 1) / count
        positives = tl.where(positive, -sigmoid(wide - p) / count, 0.0)
        weight = log_sum_exp(-log_add(wide, p) - log_count, positive)
    else:
        inside = log_sum_exp(p, positive)
        mean = tl.sum(p, 1) / count
        if rules.inside == NONE_INSIDE:
            den = rest
            some = rest != none  # without negatives there is no loss
            loss = tl.where(some, den - mean, 0.0)
            positives = tl.where(positive & some[:, None], -1.0 / count, 0.0)
        else:
            den = log_add(rest, inside)
            one = -sigmoid(rest - inside)
            if rules.numerator == LOG_SUM:
                loss = log_ratio(rest, inside) + log_count
                positives = tl.where(positive, tl.exp(p - inside[:, None]) * one[:, None], 0.0)
            else:
                # With one positive, den - p without the cancellation.
                single = count == 1
                loss = tl.where(single, log_ratio(rest, inside), den - mean)
                apart = tl.exp(p - den[:, None]) - 1.0 / count
                positives = tl.where(positive, tl.where(single, one[:, None], apart), 0.0)
        weight = tl.where(den == none, none, -den)
    log_weights = tl.where(used[None, :], weight[:, None], none)
    return loss, log_weights, positives
