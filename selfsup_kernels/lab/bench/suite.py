"""The engine of every benchmark here: one case at a time, ours and all rivals, as rows of results.

On a CPU each rival first runs once in a fresh process, under a limit of the memory that is left: that gives its peak,
and what would not fit or would take too long never runs in this process. The others then take turns by the wall clock.
On a GPU they are measured one after the other by the device's clock, and the allocator counts the peak.
"""

import functools
import gc
import itertools
import math
import subprocess
import time
import traceback

import torch

from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.bench import accuracy, results, rivals, timing
from selfsup_kernels.lab.bench.workloads import case_of

OUT_OF_TIME = "skipped: out of time"
TOO_SLOW = 10.0
"""A rival whose fewest calls would take this many times what a case is given is skipped."""
FEWEST = 6
"""Forward and backward passes that the fewest calls of all parts take together, with the first one."""
STARTING, COMPILING = 20.0, 180.0
"""Seconds that a fresh process may take besides its work, and torch.compile in it."""
TOO_LARGE = 262144
"""Rows of a two-view loss above which a GPU measures ours alone."""


class Suite:
    """One run: the clock, the rates of the device, the rows so far, and the time that is left.

    Args:
        device: of all tensors.
        dtypes: of the matrix products that fractions refer to.
        seconds: about how long the turns of one case take, all parts and rivals together, beside the fewest calls.
        rounds: of every part, in place of ``seconds``; CPUs only.
        minutes: after them nothing new begins; None for no limit.
        skip: columns to leave out.
        graphs: whether to measure replayed CUDA graphs too.
        advance: called with a text after each step, of which a case has :meth:`steps`.
        rates: of :class:`timing.Rates`: the sizes to measure with.
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
        graphs=False,
        advance=lambda text: None,
        rates=None,
        ops=tuple(rivals.RIVALS),
    ):
        self.clock = timing.Clock(device, target_ms)
        if self.clock.cuda:
            index = self.clock.device.index  # without one PyTorch refuses it
            torch.cuda.set_device(torch.cuda.current_device() if index is None else index)  # whose events count
        self.seconds, self.rounds, self.skip = seconds, rounds, set(skip)
        self.graphs, self.advance = graphs and self.clock.cuda, advance
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.rates = timing.Rates(self.clock, dtypes, **(rates or {}))
        self.facts = results.header(self.clock, ops)
        self.rows = []
        self.seen = {}

    @property
    def header(self):
        return self.facts | self.rates.header()

    def spent(self):
        return time.monotonic() > self.deadline

    def steps(self, names):
        return len(names) + 1

    def attempt(self, function):
        """``(result, None)`` or ``(None, reason)``; afterwards the memory of what failed is free again."""
        if self.spent():
            return None, OUT_OF_TIME
        try:
            return function(), None
        except Exception as error:
            reason = rivals.reason_of(error)
        self.free()
        return None, reason

    def free(self):
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    # ------------------------------------------------------------ one case

    def measure(self, case, names):
        """Rows, one for each part of the case, of the columns ``names``; also added to ``rows``."""
        columns = Columns()
        try:
            self._fill(case, names, columns)
        except Exception as error:  # what fails beyond one rival is recorded, and the next case gets its turn
            traceback.print_exc()
            columns.fail({name: rivals.reason_of(error) for name in names if name not in columns.unavailable})
        self.free()
        rows = [columns.row(case, part) for part in case.parts]
        self.rows += rows
        return rows

    def _fill(self, case, names, columns):
        if self.spent():
            columns.fail(dict.fromkeys(names, OUT_OF_TIME))
            return
        wanted = []
        for name in names:
            reason = "skipped: by --skip" if name in self.skip else self._refusal(case, name)
            if reason is None:
                small = case.small()
                reason = rivals.load(small, name, small.inputs(self.clock.device))[1]
            if reason is None and not self.clock.cuda:
                reason = self._probe(case, name, columns)
            if reason:
                columns.unavailable[name] = reason
            else:
                wanted.append(name)
            self.advance(f"{case.label}: {name}")
        if not wanted:  # inputs that nobody takes may not even fit
            self.advance(f"{case.label}: times")
            return
        inputs = self._inputs(case)
        functions = {}
        for name in wanted:
            function, reason = rivals.load(case, name, inputs[0])
            if reason:
                columns.unavailable[name] = reason
            else:
                functions[name] = function
                note = rivals.find(case.op, name).note
                if note:
                    columns.notes[name] = note
        measure = self._by_device if self.clock.cuda else self._in_turns
        measure(case, functions, inputs, columns)
        self._errors(case, functions, inputs[0], columns)
        if not self.clock.cuda:
            del inputs
            self.rates.sample()
        self.advance(f"{case.label}: times")

    def _inputs(self, case):
        """On a GPU, of what is bound by memory, several inputs to be taken in turn: none is then found in the cache."""
        count = 1
        if self.clock.cuda and case.op == "byol":
            count = max(1, min(32, math.ceil(4 * self.clock.cache_bytes() / case.bytes("forward"))))
        return [case.inputs(self.clock.device, seed) for seed in range(count)]

    def _errors(self, case, functions, inputs, columns):
        functions = {n: f for n, f in functions.items() if n in columns.times and not rivals.find(case.op, n).other}
        if not functions:
            return
        judge, reason = self.attempt(lambda: accuracy.judge(case, inputs))
        if reason:
            columns.notes["float64 reference"] = reason
            return
        for name, function in functions.items():
            errors, reason = self.attempt(functools.partial(judge, name, function))
            columns.put("errors", name, errors, reason)

    # ------------------------------------------------------------ what does not fit

    def _refusal(self, case, name):
        """Why a column is not even tried."""
        if case.op == "ema" or rivals.impl_of(name):
            return None
        if self.clock.cuda and case.op == "info_nce":
            held, free = 3 * case.rows**2 * case.item_size, self.clock.free_bytes()
            if rivals.find(case.op, name).quadratic and held > free:
                return f"skipped: out of memory, its M x M matrices take about {held / 1e9:.0f} GB"
            if case.rows > TOO_LARGE:
                return "skipped: takes too long"
        before = self.seen.get(self._kind(case, name))
        if before and case.batch > before[0]:
            expected = before[1] * (case.batch / before[0]) ** (2 if case.op == "info_nce" else 1)
            if expected > 4 * self._longest():
                return too_slow(FEWEST * expected)
        return None

    def _longest(self):
        """Seconds that one forward and backward may take."""
        return TOO_SLOW * self.seconds / FEWEST

    def _kind(self, case, name):
        return (name, *(getattr(case, key, None) for key in ("op", "views", "dim", "dtype")))

    def _probe(self, case, name, columns):
        """Peak memory, from a fresh process; a reason where the rival is not to be measured here."""
        parameters = {k: v for k, v in case.facts.items() if k in ("op", "model", "views", "batch", "dim", "dtype")}
        timeout = STARTING + 4 * self._longest()
        timeout += COMPILING if rivals.find(case.op, name).compiles else 0
        left = host_memory.available()
        try:
            found = fresh.call(
                "selfsup_kernels.lab.bench.worker:probe", parameters, name, memory_limit=left, timeout=timeout
            )
        except fresh.OutOfMemory:
            return f"out of memory: {left / 1e9:.1f} GB were available"
        except subprocess.TimeoutExpired:
            return f"skipped: one call takes more than {timeout - STARTING:.0f} s"
        except fresh.Failed as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return lines[-1].strip() if lines else "failed"
        if "reason" in found:
            return found["reason"]
        self.seen[self._kind(case, name)] = (getattr(case, "batch", 1), found["seconds"])
        columns.put("peak_bytes", name, found["peak_bytes"])
        if found["seconds"] > self._longest():
            return too_slow(FEWEST * found["seconds"])
        if (found["peak_bytes"] or 0) > host_memory.available():
            return f"out of memory: takes {found['peak_bytes'] / 1e9:.1f} GB"
        return None

    # ------------------------------------------------------------ times

    def _in_turns(self, case, functions, inputs, columns):
        arguments = inputs[0]
        last = case.parts[-1]
        for name, function in list(functions.items()):
            # A first call shows what fails, and compiles; without a gradient it compiles anew.
            first = (last, "forward") if rivals.find(case.op, name).compiles and last != "update" else (last,)
            for part in first:
                _, reason = self.attempt(functools.partial(case.run, part, function, arguments))
                if reason:
                    columns.unavailable[name] = reason
                    functions.pop(name, None)
                    break
        for part in case.parts:
            calls = {
                name: (
                    functools.partial(case.prepare, part, function, arguments),
                    functools.partial(case.work, part, function),
                )
                for name, function in functions.items()
            }
            for name, times in timing.in_turns(calls, self.seconds / len(case.parts), self.rounds).items():
                columns.times.setdefault(name, {})[part] = times

    def _by_device(self, case, functions, inputs, columns):
        measure, last = self.clock.measure, case.parts[-1]
        for name, function in functions.items():
            turn = itertools.cycle(inputs)

            def all_parts(function=function, turn=turn):
                return {
                    part: measure(
                        functools.partial(case.work, part, function),
                        lambda part=part: case.prepare(part, function, next(turn)),
                    )
                    for part in case.parts
                }

            times, reason = self.attempt(all_parts)
            if reason:
                columns.unavailable[name] = reason
                continue
            columns.times[name] = times
            for made in inputs:
                case.prepare(last, function, made)  # without the gradients of before
            run = functools.partial(case.run, last, function, inputs[0])
            columns.put("peak_bytes", name, *self.attempt(functools.partial(self.clock.peak_bytes, run)))
            if self._capturable(case, name):
                milliseconds, reason = self.attempt(functools.partial(self._graph, run))
                columns.put("graph_ms", name, milliseconds, reason)
                # After a capture that failed PyTorch's allocator and generator may still believe in it.
                self.graphs = reason is None

    def _capturable(self, case, name):
        """Whether to measure a replayed graph: where launches may take as long as the work, and nothing waits."""
        if not self.graphs or rivals.find(case.op, name).waits:
            return False
        return case.op != "info_nce" or (case.rows <= 16384 and bool(rivals.impl_of(name) or name == "eager"))

    def _graph(self, run):
        return self.clock.measure_graph(run)["p50_ms"]

    # ------------------------------------------------------------ of the device's rates

    def _cached(self, case):
        """Whether what a replayed graph reads stays in the cache from one replay on."""
        return 4 * self.clock.cache_bytes() > case.bytes(case.parts[0])

    def rate(self, rows=None):
        """Set what ours reaches of the rates of this run, as far as they are known now."""
        for row in self.rows if rows is None else rows:
            name = results.ours(row)
            if name is None:
                continue
            case, part = case_of(row), row["part"]
            milliseconds = row["times"][name]["p50_ms"]
            if row["op"] == "info_nce":
                operations = case.operations(part, "gpu" if self.clock.cuda else "cpu")
                row["tflops"] = operations / milliseconds / 1e9
                row["fraction"] = row["tflops"] / self.rates.tflops(row["dtype"])
                if "tfloat32" in self.rates.dtypes and row["dtype"] == "float32":
                    row["fraction_of_float32"] = row["tflops"] / timing.median(self.rates.samples["float32"])
                continue
            row["gb_per_s"] = case.bytes(part) / milliseconds / 1e6
            row["fraction"] = row["gb_per_s"] / self.rates.memory_gb_per_s
            graph = row.get("graph_ms", {}).get(name)
            if graph and part == case.parts[-1] and not self._cached(case):  # without what the host takes to launch
                row["graph_fraction"] = case.bytes(part) / graph / 1e6 / self.rates.memory_gb_per_s


class Columns:
    """What is found out about the rivals of one case, by column."""

    def __init__(self):
        self.times, self.unavailable, self.notes = {}, {}, {}
        self.rest = {"peak_bytes": {}, "errors": {}}

    def put(self, column, name, value, reason=None):
        """A value that belongs to a column that has times; a reason for none becomes a note."""
        if reason is None:
            self.rest.setdefault(column, {})[name] = value
        else:
            before = self.notes.get(name)
            self.notes[name] = f"{before}; {column}: {reason}" if before else f"{column}: {reason}"

    def fail(self, reasons):
        self.times = {}
        self.unavailable |= reasons

    def row(self, case, part):
        times = {name: of_parts[part] for name, of_parts in self.times.items() if part in of_parts}
        row = {**case.facts, "part": part, "times": times}
        for column, values in self.rest.items():
            row[column] = {name: value for name, value in values.items() if name in times or column == "peak_bytes"}
        return row | {"unavailable": dict(self.unavailable), "notes": dict(self.notes)}


def too_slow(seconds):
    return f"skipped: would take about {seconds:.0f} s (--seconds)"
