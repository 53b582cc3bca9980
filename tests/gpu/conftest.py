"""Fixtures of the GPU kernels' tests: InfoNCE's kernels are in Triton, the others in CUDA. With a GPU the tests run on
it. Without one, Triton's kernels run in its interpreter (TRITON_INTERPRET=1) and CUDA's in the emulator
(SELFSUP_KERNELS_CUDA_EMULATOR=LIBRARY), on CPU tensors.

Both are slow, so such runs are small, and the longest tests run only with SELFSUP_KERNELS_EVERY_CASE=1.
interpreter16.py corrects Triton's interpreter for bfloat16. Tests that need a real GPU are marked `cuda`.
"""

import os
import sys
import tempfile
from pathlib import Path

import interpreter16
import pytest
import tiles
import torch

from selfsup_kernels.core import backends
from selfsup_kernels.tiles import configs, launcher

SIMULATED = any(backends.emulated(impl) for impl in ("triton", "cuda"))

if backends.triton_is_interpreted():
    interpreter16.install()


class SaysFailuresAtOnce:
    """Print failures as they happen in parallel runs: xdist reports them only at the end, and a run that is killed at a
    time limit would report none."""

    def __init__(self, config):
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report):
        terminal = self.plugins.getplugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILED ({report.when}) {report.nodeid}\n{report.longreprtext[-3000:]}")


def pytest_configure(config):
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(SaysFailuresAtOnce(config))


def cannot_run(impl):
    """Return why the kernels of ``impl`` cannot run in this process, or None if they can."""
    if SIMULATED and not backends.emulated(impl):
        return "this run simulates other kernels on the CPU"
    if not SIMULATED and not torch.cuda.is_available():
        return "needs an NVIDIA GPU, TRITON_INTERPRET=1 or SELFSUP_KERNELS_CUDA_EMULATOR"
    reason = backends.unavailable(impl)
    return None if reason is None else str(reason)


def pytest_collection_modifyitems(items):
    for item in items:
        here = "gpu" in item.path.parts[-2:] and item.get_closest_marker("cuda")
        if here and (SIMULATED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device():
    if not SIMULATED and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, TRITON_INTERPRET=1 or SELFSUP_KERNELS_CUDA_EMULATOR")
    return torch.device("cpu" if SIMULATED else "cuda")


@pytest.fixture
def impl(request, device):
    """Return the implementation that the module tests, its ``IMPL``; skip if it cannot run."""
    reason = cannot_run(request.module.IMPL)
    if reason is not None:
        pytest.skip(reason)
    return request.module.IMPL


@pytest.fixture(autouse=True)
def left_in_order():
    """Make a kernel fail in its own test. After an illegal access nothing works in that process any more: under xdist
    it ends, and another process runs the remaining tests. Free the memory that PyTorch caches after a large test, since
    several processes may share the GPU."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(error, file=sys.__stderr__, flush=True)
            os._exit(1)
        raise
    if torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture
def alone():
    """Run tests that need much of the GPU's memory one at a time, across all processes."""
    import fcntl

    with (Path(tempfile.gettempdir()) / "selfsup_kernels_gpu_tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=tiles.WAYS)
def path(request, impl, monkeypatch):
    """Select a path of InfoNCE's launchers, which they choose by size, and tiles so small that few rows fill many.

    "clean+masked": tiles with masks have separate kernels. "all": one kernel runs all tiles, with deterministic mode's
    sums. "waves": no configuration fits the gradient's accumulator, so it goes through the workspace.
    """
    monkeypatch.setattr(configs, "_lookup", tiles.small(request.param))
    monkeypatch.setattr(launcher, "sms_of", lambda tensor: 1000 if request.param == "all" else 1)
    monkeypatch.setattr(launcher, "MANY_TILES", 0 if request.param == "clean+masked" else 16)
    monkeypatch.setattr(launcher, "deterministic", lambda: request.param == "all")
    return request.param
