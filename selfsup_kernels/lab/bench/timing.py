"""Measure times in turns, by the wall clock or by a GPU's own clock, and the rates that a device reaches."""

import functools
import time

import torch
from torch.utils.benchmark import Timer

LEAST_ROUNDS, MOST_ROUNDS = 3, 100
CALLS_A_ROUND = 10
"""A fast function is called at most this often for one call of a slow one."""
SMALLEST_PRODUCT, LONG_PRODUCT = 128, 50.0
"""The side of a matrix product, and the ms from which on no larger one is tried."""


def summary(values):
    """Return the median and the 20th and 80th percentile of times in ms."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist()
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), found, strict=True))


def in_turns(calls, seconds=1.0, rounds=None, clock=None):
    """Time ``work(prepare())`` of ``calls`` (name -> ``(prepare, work)``), without ``prepare``, in turns.

    Each round begins with another one, so that a disturbance of the machine affects all alike. What is fast is called
    several times a round. A first round says how many more fit into ``seconds``, where ``rounds`` is not given.
    """
    if not calls:
        return {}
    clock = clock or Clock("cpu")
    marks = {name: [clock.once(work, prepare)] for name, (prepare, work) in calls.items()}
    first = {name: max(clock.milliseconds(found[0]), 1e-3) for name, found in marks.items()}
    repeats = {name: round(min(CALLS_A_ROUND, max(first.values()) / first[name])) for name in calls}
    if rounds is None:
        a_round = sum(repeats[name] * first[name] for name in calls)
        rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, 1e3 * seconds / a_round)))
    order = list(calls)
    for number in range(1, rounds):
        start = number % len(order)
        for name in order[start:] + order[:start]:
            prepare, work = calls[name]
            marks[name] += [clock.once(work, prepare) for _ in range(repeats[name])]
    # A GPU's events are read after the last call, so that none waits for the host.
    times = {name: [clock.milliseconds(m) for m in found] for name, found in marks.items()}
    return {name: {**summary(values), "calls": len(values)} for name, values in times.items()}


class Clock:
    """Time work on one device: by CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device, target_ms=200.0):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.target_ms = target_ms

    def once(self, function, prepare):
        """Return a pair of marks around ``function(prepare())``."""
        argument = prepare()
        if not self.cuda:
            start = time.perf_counter()
            function(argument)
            return start, time.perf_counter()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(argument)
        end.record()
        return start, end

    def milliseconds(self, marks):
        start, end = marks
        if not self.cuda:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)

    def median_ms(self, function):
        """Return the median of the times of ``function()``, without preparing anything."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=self.target_ms / 1e3).median

    def peak_bytes(self, function):
        """Return the highest device memory that ``function()`` adds to what is allocated. GPUs only."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def cache_bytes(self):
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 2**20


class Rates:
    """Measure what the device reaches: matrix products, in TFLOP/s by dtype, and its memory, in GB/s.

    On a GPU ``float32`` is a product in full precision, ``tfloat32`` one with TF32; ``float32`` is always measured. A
    CPU's copy also reads the lines that it overwrites, which are not counted; there fractions refer to scaling numbers
    in place.
    """

    def __init__(self, clock, dtypes, size=None, copied=None):
        self.clock = clock
        self.largest, self.sizes = size or (8192 if clock.cuda else 2048), {}
        self.copied = copied or (2**30 if clock.cuda else 2**28)
        names = dict.fromkeys(["float32", *dtypes, *(["tfloat32"] if clock.cuda and "float32" in dtypes else [])])
        self.products = {name: self._product(name) for name in names}
        source = torch.randn(self.copied // 4, device=clock.device)
        to = torch.empty_like(source)
        self.copy = 2 * self.copied / clock.median_ms(lambda: to.copy_(source)) / 1e6
        self.in_place = 2 * self.copied / clock.median_ms(lambda: to.mul_(1.0)) / 1e6
        self.memory_gb_per_s = self.copy if clock.cuda else self.in_place

    def _product(self, name):
        """Measure a product as large as time allows: of 2048 x 2048 bfloat16, some CPUs take a minute."""
        dtype = torch.float32 if name == "tfloat32" else getattr(torch, name)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tfloat32" else "highest")
        try:
            side = min(SMALLEST_PRODUCT, self.largest)
            while True:
                a, b = (torch.randn(side, side, device=self.clock.device).to(dtype) for _ in range(2))
                work = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
                work()
                marks = [self.clock.once(lambda _, work=work: work(), lambda: None) for _ in range(3)]
                if side == self.largest or min(map(self.clock.milliseconds, marks)) > LONG_PRODUCT:
                    break
                side = min(2 * side, self.largest)
            self.sizes[name] = side
            return 2 * side**3 / self.clock.median_ms(work) / 1e9
        finally:
            torch.set_float32_matmul_precision(before)

    def tflops(self, dtype):
        """Return the rate of a product of that dtype, as fast as the device makes it; None where it converts."""
        rate = self.products["tfloat32" if dtype == "float32" and self.clock.cuda else dtype]
        return None if dtype in ("bfloat16", "float16") and rate < self.products["float32"] else rate

    def header(self):
        return {
            "matrix_product_tflops": self.products,
            "matrix_product_size": self.sizes,
            "copy_gb_per_s": self.copy,
            "in_place_gb_per_s": self.in_place,
            "copied_bytes": self.copied,
        }
