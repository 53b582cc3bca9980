"""Find the largest batch that fits: double it in fresh processes until memory is refused, then bisect."""

import time

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.profile import memory

CLOSE = 1.05
"""The search ends where the smallest refused batch is less than this times the largest that fits."""
STARTUP = 4.0
"""Seconds that a fresh process takes, about."""


class Growth:
    """Measured peaks and times of one variant at growing batches, and the smallest batch that is refused."""

    def __init__(self, work, limit):
        self.work, self.limit = work, limit
        self.points, self.refused = [], None

    def measure(self, batch) -> bool:
        """Run steps in a fresh process under the limit; return whether they fit."""
        target, work = "selfsup_kernels.lab.profile.workload:grown", self.work._replace(batch=batch)._asdict()
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

    def seconds(self, batch) -> float:
        """Return the predicted seconds of a step, whose growth is between linear and quadratic; 0 if unknown."""
        last = self.points[-1] if self.points else {"batch": batch, "seconds": 0.0}
        return last["seconds"] * (batch / last["batch"]) ** 1.5

    def following(self, last) -> int | None:
        """Return the batch to measure after ``last``, or None at the end of the search."""
        step = self.work.accumulate
        reached = self.points[-1]["batch"] if self.points else 0
        if self.refused is None:
            return 2 * last
        middle = max(2 * step, (reached + self.refused) // 2 // step * step)
        return middle if self.refused > CLOSE * reached and reached < middle < self.refused else None

    def json(self) -> dict:
        last = self.points[-1] if self.points else {"batch": 0 if self.refused == 2 * self.work.accumulate else None}
        return {
            "batch": last["batch"],
            "or_more": bool(self.points) and self.following(last["batch"]) is not None,
            "peak_bytes": last.get("peak_bytes"),
            "seconds": last.get("seconds"),
            "measured_to": last["batch"] or None,
            "refused": self.refused,
            "coefficients": None,  # files of earlier versions have a fit
            "points": self.points,
        }


def measure(work, limit, start, budget, advance=lambda note: None) -> Growth:
    """Search from the batch ``start`` on.

    Args:
        work: the :class:`selfsup_kernels.lab.profile.workload.Workload`; its own batch does not matter.
        limit: bytes, as :func:`selfsup_kernels.lab.profile.memory.process_peak` counts them.
        budget: seconds, about; the first batch is measured in any case, none where the system tells no peak.
        advance: called with a note before each measurement.
    """
    end, growth, batch = time.monotonic() + budget, Growth(work, limit), start
    while batch is not None and memory.process_peak(work.device) is not None:
        advance(f"{work.variant}: batch {batch}")
        growth.measure(batch)
        batch = growth.following(batch)
        if batch and time.monotonic() + STARTUP + 4 * growth.seconds(batch) > end:
            break
    return growth
