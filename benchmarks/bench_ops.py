"""The operations under pytest-benchmark, against eager PyTorch and torch.compile: ``make bench``."""

import functools
import subprocess
import sys

import pytest

from selfsup_kernels.lab.bench import baselines
from selfsup_kernels.lab.bench.workloads import PARTS, case

LOSSES = [case("info_nce", batch=b, dim=d) for b, d in ((256, 128), (1024, 128), (4096, 128), (2048, 512))]
LOSSES += [case("info_nce", objective="cross_view", batch=1024)]
LOSSES += [case("byol", batch=batch) for batch in (4096, 32768)]


def measure(benchmark, made, part, name, rounds):
    """Measure one column of a workload, after a warm-up."""
    benchmark.group = f"{made.label} {part}"
    inputs = made.inputs()
    function, reason = baselines.load(made, name, inputs)
    if reason:
        pytest.skip(reason)
    made.run(part, function, inputs)
    work = functools.partial(made.work, part, function)
    benchmark.pedantic(work, setup=lambda: ((made.prepare(part, function, inputs),), {}), rounds=rounds)


@pytest.mark.parametrize("name", ["eager", "compile", baselines.OURS])
@pytest.mark.parametrize("made", LOSSES, ids=lambda made: made.label.replace(" ", "-"))
@pytest.mark.parametrize("part", PARTS)
def test_loss(benchmark, part, made, name):
    measure(benchmark, made, part, name, rounds=3 if made.op == "info_nce" and made.batch >= 2048 else 15)


@pytest.mark.parametrize("name", [*baselines.EAGER_EMA, baselines.OURS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ema(benchmark, dtype, name):
    """Measure the moving average over ResNet-50's parameters."""
    measure(benchmark, case("ema", dtype=dtype), "update", name, rounds=15)


@pytest.mark.parametrize("module", ["torch", "selfsup_kernels"])
def test_import(benchmark, module):
    """Measure an import in a fresh process."""
    benchmark.group = "import"
    command = [sys.executable, "-c", f"import {module}"]
    benchmark.pedantic(subprocess.run, (command,), {"check": True}, rounds=5, warmup_rounds=1)
