"""Measuring: summaries of times, work in turns by the wall clock, the device's clock, and the rates of a machine."""

import time
from statistics import median

import torch

LEAST_ROUNDS = 3
MOST_ROUNDS = 100
CALLS_A_ROUND = 10
"""How often a fast function is called for one call of a slow one, at most."""


def summary(values):
    """Median, 20th and 80th percentile of times in ms."""
    values = sorted(values)
    at = [values[min(len(values) - 1, int(q * len(values)))] for q in (0.2, 0.5, 0.8)]
    return {"p20_ms": at[0], "p50_ms": at[1], "p80_ms": at[2]}


def interleave(functions, rounds):
    """The :func:`summary` of each of ``functions`` (name -> callable), called in turn, by the wall clock."""
    for function in functions.values():
        function()
    return in_turns({name: (lambda: None, lambda _, f=f: f()) for name, f in functions.items()}, rounds=rounds)


def in_turns(calls, seconds=1.0, rounds=None):
    """Wall-clock times of ``calls`` (name -> ``(prepare, work)``): of ``work(prepare())``, less ``prepare``'s.

    All are called in every round, each round beginning with another one, so that what disturbs the machine for a while
    hits all alike. What is fast is called several times a round. A first round says how many more fit into ``seconds``;
    there are at least three in all, or just ``rounds`` where that is given.

    Returns:
        ``{name: {"p20_ms", "p50_ms", "p80_ms", "calls"}}``
    """
    times = {name: [] for name in calls}

    def turn(name):
        prepare, work = calls[name]
        prepared = prepare()
        start = time.perf_counter()
        work(prepared)
        times[name].append(1e3 * (time.perf_counter() - start))

    order = list(calls)
    if not order:
        return {}
    for name in order:
        turn(name)
    slowest = max((values[0] for values in times.values()), default=0.0)
    repeats = {
        name: round(min(CALLS_A_ROUND, max(1, slowest / max(values[0], 1e-3)))) for name, values in times.items()
    }
    if rounds is None:
        a_round = sum(repeats[name] * values[0] for name, values in times.items())
        rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, 1e3 * seconds / max(a_round, 1e-3))))
    for number in range(1, rounds):
        start = number % len(order)
        for name in order[start:] + order[:start]:
            for _ in range(repeats[name]):
                turn(name)
    return {name: {**summary(values), "calls": len(values)} for name, values in times.items()}


class Clock:
    """Times of work on one device, by its own clock: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device, target_ms=200.0, most=50):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.target_ms, self.most = target_ms, most

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, function, prepare):
        """A pair of marks around ``function(prepare())``."""
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
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def measure(self, function, prepare=lambda: None):
        """The :func:`summary` of the times of ``function(prepare())``, without those of ``prepare``.

        The first call compiles and warms up, the second says how many more fit the target time: at least 3, or none
        where one takes ten times that. Their events are read after the last call, so that none waits for the host.
        """
        self.once(function, prepare)
        self.synchronize()
        marks = [self.once(function, prepare)]
        self.synchronize()
        probe = self.milliseconds(marks[0])
        if probe <= 10 * self.target_ms:
            calls = int(min(self.most, max(3, self.target_ms / max(probe, 1e-3))))
            marks = [self.once(function, prepare) for _ in range(calls)]
            self.synchronize()
        return {**summary([self.milliseconds(m) for m in marks]), "calls": len(marks)}

    def measure_graph(self, function):
        """The same of a replayed CUDA graph of ``function()``: without the time that the host takes to launch."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        return self.measure(lambda _: graph.replay())

    def peak_bytes(self, function):
        """The highest device memory that ``function()`` adds to what is allocated. GPUs only."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free_bytes(self):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def cache_bytes(self):
        if not self.cuda:
            return 2**20
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 * 2**20)


class Rates:
    """What the device reaches in this run: matrix products, in TFLOP/s by dtype, and its memory, in GB/s.

    A CPU that others use too is sampled again between cases; the medians count. On a GPU ``float32`` is a product in
    full precision, ``tfloat32`` one with TF32. The bandwidth that fractions refer to is a GPU's copy. A CPU's copy also
    reads the lines that it overwrites, which nobody counts; there the rate is that of scaling numbers in place.
    """

    def __init__(self, clock, dtypes, size=None, copied=None):
        self.clock = clock
        self.size = size or (8192 if clock.cuda else 2048)
        self.copied = copied or (2**30 if clock.cuda else 2**28)
        self.dtypes = [*dtypes, *(["tfloat32"] if clock.cuda and "float32" in dtypes else [])]
        self.samples = {name: [] for name in (*self.dtypes, "copy", "in_place")}
        self.sample()

    def sample(self):
        for name in self.dtypes:
            self.samples[name].append(self._product(name))
        source = torch.randn(self.copied // 4, device=self.clock.device)
        to = torch.empty_like(source)
        milliseconds = self.clock.measure(lambda _: to.copy_(source))["p50_ms"]
        self.samples["copy"].append(2 * self.copied / milliseconds / 1e6)
        milliseconds = self.clock.measure(lambda _: to.mul_(1.0))["p50_ms"]
        self.samples["in_place"].append(2 * self.copied / milliseconds / 1e6)

    def _product(self, name):
        dtype = torch.float32 if name == "tfloat32" else getattr(torch, name)
        a, b = (torch.randn(self.size, self.size, device=self.clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tfloat32" else "highest")
        try:
            return 2 * self.size**3 / self.clock.measure(lambda _: torch.mm(a, b, out=out))["p50_ms"] / 1e9
        finally:
            torch.set_float32_matmul_precision(before)

    def tflops(self, dtype):
        """Of a matrix product of that dtype, as fast as the device makes it."""
        return median(self.samples["tfloat32" if dtype == "float32" and self.clock.cuda else dtype])

    @property
    def memory_gb_per_s(self):
        return median(self.samples["copy" if self.clock.cuda else "in_place"])

    def header(self):
        return {
            "matrix_product_tflops": {name: median(self.samples[name]) for name in self.dtypes},
            "matrix_product_size": self.size,
            "copy_gb_per_s": median(self.samples["copy"]),
            "in_place_gb_per_s": median(self.samples["in_place"]),
            "copied_bytes": self.copied,
        }
