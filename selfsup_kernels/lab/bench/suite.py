"""Measure one case at a time, ours and all baselines, as rows of results: the engine of every benchmark here.

On a CPU each baseline first runs once in a fresh process, limited to the memory that is left: that gives its peak, and
what does not fit or takes too long never runs in this process. On a GPU the allocator counts the peak. Then all
take turns.
"""

import functools
import gc
import itertools
import math
import subprocess
import time

import torch

from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.bench import accuracy, baselines, results, timing, workloads

OUT_OF_TIME = "skipped: out of time"
PARAMETERS = ("op", "objective", "model", "views", "batch", "dim", "dtype")
LONGEST = 1.5
"""A baseline of which one forward and backward takes this many times the seconds of a case is skipped."""
LARGEST_SHARE = 1.2
"""A larger share of a measured rate says that this rate is not the device's limit."""
STARTING, COMPILING = 20.0, 180.0
"""Seconds that the start of a fresh process, and torch.compile in it, may take."""


class Suite:
    """Hold one run: the clock, the rates of the device, the rows so far, and the time that is left.

    Args:
        dtypes: of the matrix products that fractions refer to.
        seconds: about how long the turns of one case take; ``rounds`` takes precedence.
        target_ms: how long each rate of the device is measured.
        minutes: after them nothing new begins; None for no limit.
        skip: columns to leave out.
        advance: called with a text after each column of a case, and after each case.
        rates: sizes for :class:`timing.Rates`.
        compared: the tables of baselines whose packages the header lists.
        graphs: whether to measure replayed CUDA graphs too.
    """

    def __init__(
        self,
        device,
        *,
        dtypes=("float32",),
        seconds=3.0,
        rounds=None,
        target_ms=200.0,
        minutes=None,
        skip=(),
        advance=lambda text: None,
        rates=None,
        compared=None,
        graphs=False,
    ):
        self.clock = timing.Clock(device, target_ms)
        self.graphs = graphs and self.clock.cuda
        if self.clock.cuda:
            index = self.clock.device.index  # without one PyTorch refuses it
            torch.cuda.set_device(torch.cuda.current_device() if index is None else index)  # whose events count
        self.seconds, self.rounds, self.skip, self.advance = seconds, rounds, set(skip), advance
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.rates = timing.Rates(self.clock, dtypes, **(rates or {}))
        self.header = results.header(self.clock, compared) | self.rates.header()
        self.rows = []

    def attempt(self, function, *arguments):
        """Return ``(result, None)`` or ``(None, reason)``; afterwards the memory of what failed is free again."""
        if time.monotonic() > self.deadline:
            return None, OUT_OF_TIME
        try:
            return function(*arguments), None
        except Exception as error:
            reason = baselines.reason_of(error)
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()
        return None, reason

    def measure(self, case, names):
        """Return rows, one for each part of the case, of the columns ``names``; add them to ``rows`` too."""
        found = {key: {} for key in ("peak_bytes", "errors", "unavailable", "notes")}
        functions, inputs = {}, None
        for name in names:
            reason = self._refusal(case, name) or (None if self.clock.cuda else self._probe(case, name, found))
            if reason is None and inputs is None:
                inputs, reason = self.attempt(self._inputs, case)
            if reason is None:
                function, reason = baselines.load(case, name, inputs[0])
            if reason is None:
                slow, failed = self.attempt(self._first_calls, case, function, inputs[0])
                reason = failed or slow
            if reason:
                found["unavailable"][name] = reason
            else:
                functions[name] = function
                if note := baselines.find(case, name).note:
                    found["notes"][name] = note
            self.advance(f"{case.label}: {name}")
        times, reason = self.attempt(self._in_turns, case, functions, inputs)
        if reason:
            found["unavailable"] |= dict.fromkeys(functions, reason)
            functions, times = {}, {part: {} for part in case.parts}
        self._peaks_and_errors(case, functions, inputs, found)
        rows = [{**case.facts, "part": part, "times": times[part], **found} for part in case.parts]
        for name in found["errors"]:
            if accuracy.is_different(rows[0], name):
                error = f"error {accuracy.worst(rows[0], name):.0e} against float64: not the same loss?"
                found["notes"][name] = "; ".join(filter(None, (found["notes"].get(name), error)))
        self.rows += rows
        self.advance(f"{case.label}: times")
        return rows

    def _inputs(self, case):
        """Make inputs; on a GPU several to be taken in turn, so that BYOL finds none of them in the cache."""
        count = 1
        if self.clock.cuda and case.op == "byol":
            count = min(32, math.ceil(4 * self.clock.cache_bytes() / case.bytes("forward")))
        return [case.inputs(self.clock.device, seed) for seed in range(count)]

    def _refusal(self, case, name):
        if name in self.skip:
            return "skipped: by --skip"
        if time.monotonic() > self.deadline:
            return OUT_OF_TIME
        small = case.small()
        return baselines.load(small, name, small.inputs(self.clock.device))[1]

    def _probe(self, case, name, found):
        """Note the peak memory, from a fresh process; return why the baseline is not to be measured here, or None."""
        parameters = {k: v for k, v in case.facts.items() if k in PARAMETERS}
        longest = STARTING + 4 * LONGEST * self.seconds + COMPILING * baselines.find(case, name).compiles
        left = host_memory.available()
        try:
            answer = fresh.call(f"{__name__}:probe", parameters, name, memory_limit=left, timeout=longest)
        except fresh.OutOfMemory:
            return f"out of memory: {left / 1e9:.1f} GB were available"
        except subprocess.TimeoutExpired:
            return f"skipped: one call takes more than {longest - STARTING:.0f} s"
        except fresh.Failed as error:
            return str(error).strip().splitlines()[-1]
        if "reason" in answer:
            return answer["reason"]
        found["peak_bytes"][name] = answer["peak_bytes"]
        return self._too_slow(answer["seconds"])

    def _too_slow(self, seconds):
        if seconds > LONGEST * self.seconds:
            return f"skipped: one call takes {seconds:.0f} s (--seconds)"

    def _first_calls(self, case, function, inputs):
        """Make the calls that compile and show what fails; return a reason where another one takes too long."""
        run = functools.partial(case.run, case.parts[-1], function)
        run(inputs)
        reason = self._too_slow(self.clock.milliseconds(self.clock.once(run, lambda: inputs)) / 1e3)
        if reason is None:
            case.run(case.parts[0], function, inputs)  # without a gradient torch.compile compiles again
        return reason

    def _in_turns(self, case, functions, inputs):
        """Return the times of each part by name."""

        def calls(part, function, turn):
            return lambda: case.prepare(part, function, next(turn)), functools.partial(case.work, part, function)

        seconds, times = self.seconds / len(case.parts), {}
        for part in case.parts:
            of_part = {name: calls(part, function, itertools.cycle(inputs)) for name, function in functions.items()}
            times[part] = timing.in_turns(of_part, seconds, self.rounds, self.clock)
        return times

    def _peaks_and_errors(self, case, functions, inputs, found):
        """Measure the peaks of a GPU's allocator, replayed graphs of small cases, and errors against float64."""
        judged = {name for name in functions if not baselines.find(case, name).other}
        judge, reason = self.attempt(accuracy.judge, case, inputs[0]) if judged else (None, None)
        if reason:
            found["notes"]["float64 reference"] = reason
        for name, function in functions.items():
            measures = {}
            if self.clock.cuda:
                for made in inputs:
                    case.prepare(case.parts[0], function, made)  # without the gradients of before
                run = functools.partial(case.run, case.parts[-1], function, inputs[0])
                measures["peak_bytes"] = functools.partial(self.clock.peak_bytes, run)
                # The host matters less in large cases, where a graph's own memory may not fit.
                quadratic = case.op in ("info_nce", "siglip")
                few = quadratic and case.views * case.batch <= 16384 and (baselines.impl_of(name) or name == "eager")
                small = few or not quadratic
                if self.graphs and small and not baselines.find(case, name).waits:
                    measures["graph_ms"] = functools.partial(graph_ms, run)
            if judge and name in judged:
                measures["errors"] = functools.partial(judge, name, function)
            for column, measure in measures.items():
                value, reason = self.attempt(measure)
                if reason:
                    found["notes"][name] = f"{column}: {reason}"
                    # After a capture that failed, PyTorch's allocator and generator may still be in it.
                    self.graphs = self.graphs and column != "graph_ms"
                else:
                    found.setdefault(column, {})[name] = value

    def rate(self):
        """Set what ours reaches, and its share of the rates of this run, in all rows.

        There is no share of a matrix product that is not the device's limit: where the device has no arithmetic in
        the type, a product converts, and is slower than in float32; and some libraries have slow products for some
        devices. There is none of the memory's rate where the numbers fit into a cache.
        """
        for row in self.rows:
            name, case, part = results.ours(row), workloads.case_of(row), row["part"]
            if name is None:
                continue
            milliseconds = row["times"][name]["p50_ms"]
            if row["op"] in ("info_nce", "siglip"):
                row["tflops"] = case.operations(part, "gpu" if self.clock.cuda else "cpu") / milliseconds / 1e9
                limit = self.rates.tflops(row["dtype"])
            else:
                row["gb_per_s"] = case.bytes(part) / milliseconds / 1e6
                limit = self.rates.memory_gb_per_s
            share = limit and row.get("tflops", row.get("gb_per_s")) / limit
            if share and share <= LARGEST_SHARE:
                row["fraction"] = share


def graph_ms(function):
    """Return the time of ``function()`` in a replayed CUDA graph: without what the host takes to launch it."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(function, return_mode="median")


def probe(parameters, name) -> dict:
    """Run one baseline on one case, in a fresh process.

    Return ``{"peak_bytes", "seconds"}`` of one forward and backward (or update), bytes above the inputs, or
    ``{"reason"}``; raise where memory is refused.
    """
    try:
        case = workloads.case(**parameters)
        compiles, part = baselines.find(case, name).compiles, case.parts[-1]
        # Libraries, threads and code are there before the measurement begins; torch.compile's code for this very shape.
        first = case if compiles else case.small()
        inputs = first.inputs()
        function, reason = baselines.load(first, name, inputs)
        if reason:
            return {"reason": reason}
        first.run(part, function, inputs)
        first.prepare(first.parts[0], function, inputs)
        if not compiles:
            inputs = case.inputs()
            function, _ = baselines.load(case, name, inputs)
        host_memory.trim()  # what making the inputs has left would be used first, and not be seen
        peak = host_memory.peak_growth(lambda: case.run(part, function, inputs))
        milliseconds = timing.Clock("cpu").median_ms(lambda: case.run(part, function, inputs))
        return {"peak_bytes": peak, "seconds": milliseconds / 1e3}
    except Exception as error:
        if host_memory.refused(error):
            raise
        return {"reason": baselines.reason_of(error)}
