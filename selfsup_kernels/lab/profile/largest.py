"""The largest batch that fits: peaks measured at growing batches, and what they say of a limit.

The peak of a step grows by what each sample needs (inputs, activations) and, for losses that hold a similarity matrix,
by what each pair needs: ``a + b B + c B^2``, none of them negative.
"""

import math
import time

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.profile import memory

CLOSE = 0.97
"""The share of the predicted batch that is measured next: near enough to be sure, far enough to fit."""
PROBE = 1.12
"""How far above the prediction a batch is tried that should not fit."""
NEAR = 1.03
"""A batch larger by less than this is not worth another measurement."""
STRIDE = 4
"""How much larger than the largest measured batch the next one may be."""
REACH = 8
"""How far beyond the largest measured batch a prediction is told; further on it is "or more"."""
RECENT = 4
"""How many of the largest batches are fitted: with small ones the encoder makes the peak, with large ones the loss."""
LIMIT = 1 << 24
"""No batch beyond this is looked for."""
STARTUP = 4.0
"""Seconds that a fresh process takes, about."""


def fit(batches, values) -> tuple[float, float, float]:
    """``(a, b, c)``, none negative, of the least squares of ``a + b B + c B^2``."""
    import numpy

    x, y = numpy.asarray(batches, float) / max(batches), numpy.asarray(values, float)
    powers = list(range(min(3, len(set(batches)))))
    while True:
        found = numpy.linalg.lstsq(x[:, None] ** powers, y, rcond=None)[0]
        if len(powers) == 1 or (found >= 0).all():
            break
        del powers[int(found.argmin())]
    coefficients = dict(zip(powers, found, strict=True))
    return tuple(float(coefficients.get(power, 0.0)) / max(batches) ** power for power in range(3))


def value(coefficients, batch) -> float:
    a, b, c = coefficients
    return a + b * batch + c * batch**2


def solve(coefficients, limit) -> int:
    """The largest batch whose value is within ``limit``; 0 if there is none, at most ``LIMIT``."""
    a, b, c = coefficients
    if a > limit:
        return 0
    if value(coefficients, LIMIT) <= limit:
        return LIMIT
    # Written so that nothing cancels where c is small.
    return int(2 * (limit - a) / (b + math.sqrt(b * b + 4 * c * (limit - a))) * (1 + 1e-12))


class Growth:
    """Measured peaks and times of one variant over the batch, and what they predict."""

    def __init__(self, work, limit):
        self.work, self.limit = work, limit
        self.points, self.refused = [], None

    def measure(self, batch) -> bool:
        """Run steps in a fresh process under the limit; whether they fitted."""
        target, work = "selfsup_kernels.lab.profile.workload:grown", self.work.of(batch=batch).json()
        try:
            if self.work.device == "cpu":
                point = fresh.call(target, work, memory_limit=self.limit)
            else:
                point = fresh.call(target, work, self.limit)
        except fresh.Failed as error:
            # A library may refuse memory in other words; where a smaller batch trained, size is what fails.
            if not self.points and not isinstance(error, fresh.OutOfMemory):
                raise
            self.refused = min(batch, self.refused or batch)
            return False
        self.points = sorted([*self.points, point], key=lambda p: p["batch"])
        return True

    @property
    def recent(self) -> list:
        """The largest batches whose peaks grow.

        The C library keeps freed blocks of up to 32 MB and returns larger ones at once, so that a larger batch may take
        less: what was measured before says little then.
        """
        points = self.points[-RECENT:]
        falls = [i for i in range(1, len(points)) if points[i]["peak_bytes"] < points[i - 1]["peak_bytes"]]
        return points[falls[-1] :] if falls else points

    @property
    def coefficients(self):
        recent = self.recent if len(self.recent) > 1 else self.points[-RECENT:]
        return fit([p["batch"] for p in recent], [p["peak_bytes"] for p in recent]) if len(recent) > 1 else None

    def peak(self, batch) -> float | None:
        """Predicted bytes."""
        return value(self.coefficients, batch) if self.coefficients else None

    def seconds(self, batch) -> float | None:
        """Predicted seconds of a step; its growth is between linear and quadratic."""
        last = self.points[-1] if self.points else None
        return last["seconds"] * max(batch / last["batch"], (batch / last["batch"]) ** 1.5) if last else None

    @property
    def largest(self) -> int | None:
        """The largest batch that fits, by all that was measured; 0 if none does, None if too little is known."""
        step = self.work.accumulate
        if not self.coefficients:
            return 0 if self.refused == 2 * step else None
        batch = solve(self.coefficients, self.limit) // step * step
        if self.refused is not None:
            batch = min(batch, self.refused - step)
        return max(batch, self.points[-1]["batch"])

    def json(self) -> dict:
        batch, reached = self.largest, self.points[-1]["batch"] if self.points else None
        told = min(batch, REACH * reached) if batch else batch
        return {
            "batch": told,
            "or_more": told != batch,
            "peak_bytes": self.peak(told) if told else None,
            "seconds": self.seconds(told) if told else None,
            "measured_to": reached,
            "refused": self.refused,
            "coefficients": self.coefficients and list(self.coefficients),
            "points": self.points,
        }

    def following(self, last) -> int | None:
        """The batch to measure after ``last``, or None where the present ones say enough."""
        step, points = self.work.accumulate, self.points
        if not points:
            return max(2 * step, last // 4 // step * step) if last > 2 * step else None
        reached = points[-1]["batch"]
        if len(points) < 3:
            aim = 2 * reached
        elif len(self.recent) < 3 and self.recent != points[-RECENT:]:  # the peak has just fallen
            aim = PROBE * reached
        else:
            aim = min(CLOSE * solve(self.coefficients, self.limit), STRIDE * reached)
        if self.refused is None and aim <= NEAR * reached:
            aim = PROBE * self.largest
        if self.refused is not None and aim >= CLOSE * self.refused:
            aim = math.sqrt(reached * self.refused)
        aim = int(aim) // step * step
        return aim if aim > NEAR * reached else None


def measure(work, limit, start, budget, advance=lambda note: None) -> Growth:
    """Measure growing batches from ``start`` on, each in a fresh process, until one is close to what the limit allows.

    Args:
        work: the :class:`selfsup_kernels.lab.profile.workload.Workload`; its own batch does not matter.
        limit: bytes, as :func:`selfsup_kernels.lab.profile.memory.process_peak` counts them.
        budget: seconds, about; the first batch is measured in any case, none where the system tells no peak.
        advance: called with a note before each measurement.
    """
    begin = time.monotonic()
    growth = Growth(work, limit)
    batch = max(2 * work.accumulate, start // work.accumulate * work.accumulate)
    for _ in range(12):
        if batch is None or memory.process_peak(work.device) is None:
            break
        expected = growth.seconds(batch)
        left = budget - (time.monotonic() - begin)
        if len(growth.points) > 1 and STARTUP + 4 * expected > left:
            break
        advance(f"{work.variant}: batch {batch}")
        growth.measure(batch)
        batch = growth.following(batch)
    return growth
