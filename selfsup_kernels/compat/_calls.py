"""Counts of the calls of patched libraries, by who computed them."""

import threading
import warnings
from collections import Counter
from typing import NamedTuple

from selfsup_kernels.core.lazy import constant

_MOST_REASONS = 16
"""The most reasons kept per class or function, which bounds the report and the number of warnings."""
_lock = threading.Lock()
_calls: dict[str, "Calls"] = {}


class Calls(NamedTuple):
    """The calls of one class or function of a patched library."""

    ours: int
    """The number of calls that our kernels computed."""
    original: int
    """The number of calls that the library's own code computed."""
    reasons: dict[str, int]
    """The number of the library's calls by reason."""


class Report(dict):
    """The :class:`Calls` by full name of a class or function; prints one line for each of them and each reason."""

    def __str__(self):
        lines = []
        for name, calls in self.items():
            lines.append(f"{name}: {calls.ours} calls ours, {calls.original} the original's")
            lines += [f"    {count}: {reason}" for reason, count in calls.reasons.items()]
        return "\n".join(lines) or "no calls of a patched class or function"


def report() -> Report:
    """Return how many calls of patched libraries our kernels computed in this process, how many not, and why.

    It prints as::

        lightly.loss.ntx_ent_loss.NTXentLoss: 390 calls ours, 10 the original's
            10: a temperature below zero

    A call that ``torch.compile`` traces is counted when it is traced, once per graph.
    """
    with _lock:
        return Report({name: calls._replace(reasons=dict(calls.reasons)) for name, calls in _calls.items()})


@constant
def record(name: str, reason: str | None) -> None:
    """Count a call; the first time the original computes one for ``reason``, warn."""
    with _lock:
        calls = _calls.get(name, Calls(0, 0, Counter()))
        if reason is not None and reason not in calls.reasons and len(calls.reasons) >= _MOST_REASONS:
            reason = "further reasons"
        first = reason is not None and not calls.reasons[reason]
        if reason is None:
            calls = calls._replace(ours=calls.ours + 1)
        else:
            calls = calls._replace(original=calls.original + 1)
            calls.reasons[reason] += 1
        _calls[name] = calls
    if first:
        warnings.warn(
            f"{name}: the library's own code computes this, the kernels do not support {reason}; warned once,"
            " selfsup_kernels.compat.report() counts such calls",
            stacklevel=2,
        )
