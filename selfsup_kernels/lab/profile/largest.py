"""The largest batch that fits: measured growth of the peak, and what it says of a limit.

The peak of a step grows by what each sample needs (inputs, activations) and, for losses that hold a similarity matrix,
by what each pair needs: ``a + b B + c B^2``, none of them negative.
"""

import itertools
import math
import time

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.profile import limit as limits

CLOSE = 0.93
"""The share of the predicted batch at which it is measured again: near enough to be sure, far enough to fit."""
NEAR = 1.03
"""A batch larger by less than this is not worth another measurement."""
PROBE = 1.12
"""How far above the advice a batch is tried that should not fit."""
STRIDE = 4
"""How much larger than the largest measured batch the next one may be."""
REACH = 8
"""How far beyond the largest measured batch a prediction is worth telling; further on it says "or more"."""
RECENT = 4
"""How many of the largest batches are fitted: with small ones the encoder makes the peak, with large ones the loss."""
LIMIT = 1 << 24
"""No batch beyond this is looked for."""
STARTUP = 4.0
"""Seconds that a fresh process takes, about."""


def fit(batches, values) -> tuple[float, float, float]:
    """``(a, b, c)``, none negative, of the least squares of ``a + b B + c B^2`` relative to the largest value.

    Raises:
        ValueError: fewer than two different batches, numbers that are not finite, or values that are not positive.
    """
    import numpy

    x, y = numpy.asarray(batches, float), numpy.asarray(values, float)
    if x.shape != y.shape or len(set(x.tolist())) < 2:
        raise ValueError(f"batches: expected at least 2 different ones with a value each, got {list(batches)}")
    if not (numpy.isfinite(x).all() and numpy.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError(f"values: expected positive finite numbers, got {list(values)} for batches {list(batches)}")
    scale = x.max()
    columns = numpy.stack([numpy.ones_like(x), x / scale, (x / scale) ** 2], 1)
    best = (math.inf, None)
    # The best fit without negatives uses some of the three columns freely, and not the others: eight cases.
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        if len(chosen) > len(set(x.tolist())):
            continue
        part = columns[:, chosen]
        found = numpy.linalg.lstsq(part, y, rcond=None)[0]
        error = float(((part @ found - y) ** 2).sum())
        if (found >= 0).all() and error < best[0] * (1 - 1e-9):
            full = numpy.zeros(3)
            full[list(chosen)] = found
            best = (error, full)
    a, b, c = best[1]
    return float(a), float(b / scale), float(c / scale**2)


def value(coefficients, batch) -> float:
    a, b, c = coefficients
    return a + b * batch + c * batch**2


def solve(coefficients, limit, multiple=1) -> int:
    """The largest multiple of ``multiple`` whose value is within ``limit``; 0 if there is none, at most ``LIMIT``."""
    a, b, c = coefficients
    if value(coefficients, LIMIT) <= limit:
        batch = LIMIT
    elif a > limit:
        return 0
    else:
        # Written so that nothing cancels where c is small: 2 (limit - a) / (b + sqrt(b^2 + 4 c (limit - a))).
        batch = 2 * (limit - a) / (b + math.sqrt(b * b + 4 * c * (limit - a)))
    batch = int(batch * (1 + 1e-12)) // multiple * multiple
    return batch


class Growth:
    """Measured peaks and times of one variant over the batch, and what they predict."""

    def __init__(self, work, limit):
        self.work, self.limit = work, limit
        self.points, self.refused = [], None
        self.startup = STARTUP

    @property
    def smallest(self) -> int:
        """A contrast needs two samples in each of the batches that are accumulated."""
        return 2 * self.work.accumulate

    def measure(self, batch) -> bool:
        """Run steps in a fresh process under the limit; whether they fitted."""
        work = self.work.of(batch=batch)
        begin = time.monotonic()
        try:
            point = _limited("grown", work, self.limit)
        except fresh.OutOfMemory:
            self.refused = min(batch, self.refused or batch)
            return False
        # A compiler's time is part of it; of large batches so are their first, slow, steps.
        startup = time.monotonic() - begin - 3 * point["seconds"]
        self.startup = min(startup, self.startup) if self.points else startup
        self.points = sorted([*self.points, point], key=lambda p: p["batch"])
        return True

    def fit(self, key) -> tuple[float, float, float]:
        """The coefficients of ``peak_bytes`` or ``seconds``."""
        recent = self.recent if len(self.recent) > 1 else self.points[-RECENT:]
        return fit([p["batch"] for p in recent], [p[key] for p in recent])

    @property
    def recent(self) -> list:
        """The largest batches whose peaks grow.

        The C library keeps freed blocks of up to 32 MB and returns larger ones at once, so that a larger batch may take
        less: what was measured before says little then.
        """
        points = self.points[-RECENT:]
        falls = [i for i in range(1, len(points)) if points[i]["peak_bytes"] < points[i - 1]["peak_bytes"]]
        return points[falls[-1] :] if falls else points

    def peak(self, batch) -> float | None:
        """Predicted bytes."""
        return value(self.fit("peak_bytes"), batch) if len(self.points) >= 2 else None

    def seconds(self, batch) -> float | None:
        """Predicted seconds of a step."""
        return value(self.fit("seconds"), batch) if len(self.points) >= 2 else None

    @property
    def largest(self) -> int | None:
        """The largest batch that fits, by all that has been measured; None if too little has."""
        if len(self.points) < 2:
            return 0 if self.refused == self.smallest else None
        batch = solve(self.fit("peak_bytes"), self.limit, self.work.accumulate)
        # What was seen is stronger than what was fitted.
        if self.refused is not None:
            batch = min(batch, self.refused - self.work.accumulate)
        batch = max(batch, self.points[-1]["batch"])
        return batch if batch >= self.smallest else 0

    def json(self) -> dict:
        batch, more = self.largest, False
        if batch:
            known = REACH * self.points[-1]["batch"]
            batch, more = min(batch, known), batch > known
        return {
            "batch": batch,
            "or_more": more,
            "peak_bytes": self.peak(batch) if batch else None,
            "seconds": self.seconds(batch) if batch else None,
            "measured_to": self.points[-1]["batch"] if self.points else None,
            "refused": self.refused,
            "coefficients": list(self.fit("peak_bytes")) if len(self.points) >= 2 else None,
            "points": self.points,
        }


def measure(work, limit, start, budget, advance=lambda note: None) -> Growth:
    """Measure growing batches from ``start`` on, each in a fresh process, until one is close to what the limit allows.

    Args:
        work: the :class:`selfsup_kernels.lab.profile.workload.Workload`; its own batch does not matter.
        limit: bytes, as :mod:`selfsup_kernels.lab.profile.limit` counts them.
        budget: seconds, about. Two batches are measured in any case; none where the system tells no peak.
        advance: called with a note before each measurement.
    """
    begin = time.monotonic()
    growth = Growth(work, limit)
    if not limits.known(work.device):
        return growth
    step = work.accumulate
    batch = max(growth.smallest, start // step * step)
    tried = set()
    while batch not in tried and len(tried) < 12:
        tried.add(batch)
        advance(f"{work.variant}: batch {batch}")
        growth.measure(batch)
        following = _next(growth, batch)
        if following is None:
            break
        left = budget - (time.monotonic() - begin)
        expected = growth.seconds(following)
        # Time between linear and quadratic: with few points a small batch hides that it will be quadratic.
        if expected is not None and len(growth.points) < 4:
            last = growth.points[-1]
            expected = max(expected, last["seconds"] * (following / last["batch"]) ** 1.5)
        if expected is not None and growth.startup + 4 * expected > left:
            smaller = _affordable(growth, left, step)
            if smaller is None:
                break
            following = min(following, smaller)
        batch = following
    return growth


def _next(growth, last):
    """The batch to measure next, or None where the present ones say enough."""
    step, points = growth.work.accumulate, growth.points
    if not points:  # even the first was too large
        return max(growth.smallest, last // 4 // step * step) if last > growth.smallest else None
    reached = points[-1]["batch"]
    if len(points) < 3:
        aim = 2 * reached
    elif len(growth.recent) < 3 and growth.recent != points[-RECENT:]:
        aim = PROBE * reached
    else:
        aim = min(CLOSE * solve(growth.fit("peak_bytes"), growth.limit), STRIDE * reached)
    if growth.refused is not None and aim >= CLOSE * growth.refused:
        aim = math.sqrt(reached * growth.refused)
    if growth.refused is None and aim <= NEAR * reached:
        aim = PROBE * growth.largest  # nothing was refused so far: is there really no more?
    aim = int(aim) // step * step
    return aim if aim > NEAR * reached else None


def _affordable(growth, seconds, step):
    """The largest batch, well above those measured, whose measurement takes no longer; None if there is none."""
    last = growth.points[-1]
    spare = (seconds - growth.startup) / 4
    if spare <= 0:
        return None
    batch = int(last["batch"] * (spare / last["seconds"]) ** (1 / 1.5)) // step * step
    return batch if batch >= 1.5 * last["batch"] else None


def survives(work, limit) -> bool:
    """Whether real steps of this batch end in a fresh process under the limit."""
    try:
        return _limited("survives", work, limit)
    except fresh.OutOfMemory:
        return False


def _limited(function, work, limit):
    """A function of the workload in a fresh process that gets no more than ``limit`` bytes of the device's memory."""
    target = f"selfsup_kernels.lab.profile.workload:{function}"
    if work.device == "cpu":
        return fresh.call(target, work.json(), memory_limit=limit)
    return fresh.call(target, work.json(), limit)
