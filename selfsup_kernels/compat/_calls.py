"""What became of the calls of patched libraries."""

import threading
import warnings
from collections import Counter
from typing import NamedTuple

from selfsup_kernels.core.lazy import constant

_MOST_REASONS = 16
"""Of one class or function that are told apart: a report does not grow for ever, nor do its warnings."""
_lock = threading.Lock()
_calls: dict[str, "Calls"] = {}


class Calls(NamedTuple):
    """The calls of one class or function of a patched library."""

    ours: int
    """How many our kernels computed."""
    original: int
    """How many the library's own code computed."""
    reasons: dict[str, int]
    """Why it did, and how often for that reason."""


class Report(dict):
    """By the full name of a class or function, its :class:`Calls`; printed, a line for each and for each reason."""

    def __str__(self):
        lines = []
        for name, calls in self.items():
            lines.append(f"{name}: {calls.ours} calls ours, {calls.original} the original's")
            lines += [f"    {count}: {reason}" for reason, count in calls.reasons.items()]
        return "\n".join(lines) or "no calls of a patched class or function"


def report() -> Report:
    """How many calls of patched libraries this process has computed by our kernels, how many not, and why.

    ::

        >>> print(selfsup_kernels.compat.report())
        lightly.loss.ntx_ent_loss.NTXentLoss: 390 calls ours, 10 the original's
            10: a temperature below zero

    A call that ``torch.compile`` traced counts where it was traced, once a graph.
    """
    with _lock:
        return Report({name: calls._replace(reasons=dict(calls.reasons)) for name, calls in _calls.items()})


@constant
def record(name: str, reason: str | None) -> None:
    """Count a call; a reason why the original computed it is warned of the first time."""
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
            f"{name}: the library's own code computes this, the kernels do not serve {reason}; said once,"
            " selfsup_kernels.compat.report() counts such calls",
            stacklevel=2,
        )
