"""Measuring: summaries of times, a wall clock and the device's clock, what a machine is, peak memory."""

import json
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

import selfsup_kernels as sk


def summary(values):
    """Median, 20th and 80th percentile of times in ms."""
    values = sorted(values)
    at = [values[min(len(values) - 1, int(q * len(values)))] for q in (0.2, 0.5, 0.8)]
    return {"p20_ms": at[0], "p50_ms": at[1], "p80_ms": at[2]}


def interleave(functions, rounds):
    """The :func:`summary` of each of ``functions`` (name -> callable), called in turn, by the wall clock."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(values) for name, values in times.items()}


def versions():
    """The part of a results file's header that does not depend on the kind of device."""
    return {
        "torch": torch.__version__,
        "selfsup_kernels": sk.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(folder, name, header, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


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
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.measure(lambda _: graph.replay())

    def peak_bytes(self, function):
        """The highest device memory that ``function()`` adds to what is allocated; None on a CPU."""
        if not self.cuda:
            function()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free_bytes(self):
        if not self.cuda:
            return 2**33
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def cache_bytes(self):
        if not self.cuda:
            return 2**20
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 * 2**20)

    def header(self):
        if not self.cuda:
            return {"device": processor_name(), "triton": None, "driver": None, **versions()}
        import triton

        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": self.cache_bytes(),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            **versions(),
        }


def driver_version():
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out = subprocess.run(query, capture_output=True, text=True)
        if out.returncode == 0 and out.stdout.strip():
            return out.stdout.split()[0]
    return None


def matrix_product_tflops(clock, dtype, size, tf32=False):
    """The rate of a product of two square random matrices, in TFLOP/s."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / clock.measure(lambda _: torch.mm(a, b, out=out))["p50_ms"] / 1e9
    finally:
        torch.set_float32_matmul_precision(before)


def copy_gb_per_s(clock, size):
    """The rate of a copy within the device's memory, bytes read plus bytes written."""
    source = torch.randn(size // 4, device=clock.device)
    to = torch.empty_like(source)
    return 2 * size / clock.measure(lambda _: to.copy_(source))["p50_ms"] / 1e6
