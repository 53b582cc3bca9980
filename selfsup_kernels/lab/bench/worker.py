"""One rival on one case in a fresh process: whether it fits, what memory it takes, and about how long it takes."""

import time

from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import rivals, workloads

ENOUGH = 2.0
"""Seconds after which no further call is made: a first one may be slow for reasons of its own."""


def probe(parameters, name) -> dict:
    """``{"peak_bytes", "seconds"}`` of one forward and backward (or update) above the inputs, or ``{"reason"}``.

    Args:
        parameters: of :func:`workloads.case`.
        name: the rival's column.

    Raises:
        what a refused allocation raises; any other exception is a reason.
    """
    try:
        return measure(parameters, name)
    except Exception as error:
        if host_memory.refused(error):
            raise
        return {"reason": rivals.reason_of(error)}


def measure(parameters, name):
    case = workloads.case(**parameters)
    part = case.parts[-1]
    # Libraries, threads and code are there before the measurement begins.
    small = case.small()
    inputs = small.inputs()
    function, reason = rivals.load(small, name, inputs)
    if reason:
        return {"reason": reason}
    compiles = rivals.find(case.op, name).compiles
    if not compiles:
        small.run(part, function, inputs)
    inputs = case.inputs()
    function, _ = rivals.load(case, name, inputs)
    if compiles:  # for this very shape
        case.run(part, function, inputs)
        case.prepare("forward", function, inputs)
    host_memory.trim()  # what making the inputs has left would be used first, and not be seen
    took = []

    def run():
        start = time.perf_counter()
        case.run(part, function, inputs)
        took.append(time.perf_counter() - start)

    peak = host_memory.peak_growth(run)
    while len(took) < 3 and sum(took) < ENOUGH:
        run()
    return {"peak_bytes": peak, "seconds": min(took)}
