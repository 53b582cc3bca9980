"""Tests of the GPU kernels: Triton's of InfoNCE, CUDA's of the rest. On a machine with a GPU they run there. Without
one, Triton's run in its interpreter (TRITON_INTERPRET=1) and CUDA's in the emulator
(SELFSUP_KERNELS_CUDA_EMULATOR=LIBRARY), on CPU tensors.

Both are slow: such runs are small. Triton's interpreter, which interpreter16.py makes right for bfloat16, has a part of
InfoNCE's cases, so chosen that any two values of a test's parameters meet, the way among them (the fixture `path`), and
in 16 bits each dtype and most ways. With SELFSUP_KERNELS_EVERY_CASE=1 it has all that a GPU has, the long tests too.
What needs a real GPU is marked `cuda`.
"""

import collections
import itertools
import os
import sys
import tempfile
from pathlib import Path

import interpreter16
import pytest
import tiles
import torch
from helpers import EVERY_CASE, LOW_PRECISION

from selfsup_kernels.core import backends
from selfsup_kernels.tiles import configs, launcher

SIMULATED = any(backends.emulated(impl) for impl in ("triton", "cuda"))

if backends.triton_is_interpreted():
    interpreter16.install()


class SaysFailuresAtOnce:
    """Where processes share the tests: at the end xdist first waits for them, and a run that is stopped at a limit of
    time would be killed before it has said what had failed."""

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
    """None where the kernels of ``impl`` can run in this process, else why not."""
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
    if backends.triton_is_interpreted() and not EVERY_CASE:
        in_turn(items)


def in_turn(items):
    """Leave a part of the cases of each test of the interpreted kernels.

    In 16 bits, of each dtype by each way, one: of the next case the next. Of a test with few cases two, one for each
    dtype. In float32, enough that any two values of the test's parameters, the way among them, are in one case.
    """
    low = collections.defaultdict(lambda: collections.defaultdict(list))
    exact = collections.defaultdict(list)
    for item in items:
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if not given or getattr(item.module, "IMPL", None) != "triton":
            continue
        if given.get("dtype") in LOW_PRECISION:
            if "path" not in given:
                continue
            form = tiles.WAYS.index(given.pop("path")), LOW_PRECISION.index(given.pop("dtype"))
            low[item.path, item.originalname][str(given)].append((form, item))
        else:
            exact[item.path, item.originalname].append(item)
    kept = {item for cases in exact.values() for item in covering(cases)}
    for cases in low.values():
        for number, case in enumerate(cases.values()):
            forms = [item for _, item in sorted(case, key=lambda pair: pair[0])]
            turns = [number] if len(cases) >= len(forms) else [number, number + 3]
            kept |= {forms[k % len(forms)] for k in turns}
    thinned = [*itertools.chain(*exact.values()), *(i for cases in low.values() for c in cases.values() for _, i in c)]
    for item in thinned:
        if item not in kept:
            item.add_marker(pytest.mark.skip(reason="left to SELFSUP_KERNELS_EVERY_CASE=1"))


def covering(items):
    """Choose cases until each two values that are in some case together are in a chosen one; always the case that adds
    most of them."""
    pairs = {item: set(itertools.combinations(sorted(map(str, item.callspec.params.items())), 2)) for item in items}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(pairs[item] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen or items


@pytest.fixture
def device():
    if not SIMULATED and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, TRITON_INTERPRET=1 or SELFSUP_KERNELS_CUDA_EMULATOR")
    return torch.device("cpu" if SIMULATED else "cuda")


@pytest.fixture
def impl(request, device):
    """The implementation whose tests a module has: its ``IMPL``."""
    reason = cannot_run(request.module.IMPL)
    if reason is not None:
        pytest.skip(reason)
    return request.module.IMPL


@pytest.fixture(autouse=True)
def left_in_order():
    """A kernel that fails does so in its own test. After an illegal access nothing works in that process any more:
    under xdist it ends, and another one goes on with the other tests. What PyTorch keeps of a large test's memory goes
    back, since many processes may share the GPU."""
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
    """For tests that take a good part of a GPU's memory: one at a time, in however many processes."""
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
    """The ways of InfoNCE: small tiles, so that a few rows are many, and each way that the launchers choose by size.

    Tiles with masks have kernels of their own, or all have the same (with the sums of deterministic mode). No
    configuration for the gradient's accumulator sends it through the workspace.
    """
    monkeypatch.setattr(configs, "_lookup", tiles.small(request.param))
    monkeypatch.setattr(launcher, "processors_of", lambda tensor: 1000 if request.param == "all" else 1)
    monkeypatch.setattr(launcher, "MANY_TILES", 0 if request.param == "clean+masked" else 16)
    monkeypatch.setattr(launcher, "deterministic", lambda: request.param == "all")
    return request.param
