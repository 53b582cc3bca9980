"""Fixtures: one run per implementation, a fixed thread count, and memory that is never zero by accident."""

import os

# Waiting threads sleep: on a shared machine, spinning makes small parallel regions a hundred times slower.
# Set before torch is imported, since OpenMP reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# `poisoned_memory` enables deterministic algorithms, for which cuBLAS needs a workspace. Older versions of PyTorch do
# not provide one per stream: without this variable, products of CUDA tensors raise there.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Fused multiply-add changes the bits of an average, and some tests compare them with PyTorch's.
if os.environ.get("SELFSUP_KERNELS_CPU_CAPABILITY") == "default":
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "default")

import collections
import importlib.util
import time

import hypothesis
import pytest
import torch
from helpers import EVERY_CASE, EXTENSION_REQUIRED, IMPLS, covering, implementation, parameters
from profile_cases import CountedTime
from ranks import Ranks

from selfsup_kernels.byol import reference as of_byol
from selfsup_kernels.core import backends
from selfsup_kernels.info_nce import few_scores
from selfsup_kernels.lab.profile.recorder import CPUClock

# No deadlines, since a first call may compile; no check that examples are generated fast, which fails on a busy
# machine; derandomized, so that failures are reproducible.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
    max_examples=200,
    database=None,
)
hypothesis.settings.load_profile("suite")


# Those tests need the libraries of make interop.
collect_ignore = [] if importlib.util.find_spec("lightly") else ["interop"]


class KeepsFailures:
    """Appends the names of failed tests to a file, which `make test` prints at the end."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"FAILED {report.nodeid}{'' if report.when == 'call' else f' ({report.when})'}\n")

    def pytest_collectreport(self, report):
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"FAILED {report.nodeid} (collection)\n")


def pytest_configure(config):
    path = os.environ.get("SELFSUP_KERNELS_FAILED_TESTS")
    if path and not hasattr(config, "workerinput"):  # workers of xdist report to the main process, which writes
        config.pluginmanager.register(KeepsFailures(path))


DEAR = {"found", "calls", "site", "run", "quick", "written"}
"""Fixtures of modules that take a minute."""


def pytest_collection_modifyitems(config, items):
    """Of a test with three parameters or more, keep enough cases that any two values meet: most faults need no more
    (Kuhn et al., Software fault interactions and implications for software testing, 2004). So for each implementation,
    but of eager PyTorch, which has the same code for all types and sizes, keep enough that each value occurs."""
    # xdist gives the first tests to one process, so what these share is made once.
    items.sort(key=lambda item: DEAR.isdisjoint(item.fixturenames))
    if EVERY_CASE:
        return
    tests = collections.defaultdict(list)
    for item in items:
        if len(parameters(item)) > 2:
            tests[item.path, item.originalname, implementation(item)].append(item)
    kept = {
        item for (*_, impl), cases in tests.items() for item in covering(cases, 1 if "reference" in str(impl) else 2)
    }
    left = {item for cases in tests.values() for item in cases if item not in kept}
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=list(left))


def pytest_report_header(config):
    missing = backends.unavailable("cpu")
    return f"implementations: {', '.join(IMPLS)}" + (f"; no cpu: {missing}" if missing else "")


def pytest_sessionstart(session):
    if EXTENSION_REQUIRED and "cpu" not in IMPLS:
        pytest.exit(
            f"{backends.unavailable('cpu')}\nOr set SELFSUP_KERNELS_SKIP_BUILD=1 to test without it.", returncode=1
        )


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=IMPLS)
def op_impl(request, monkeypatch):
    """Like ``impl``, but "reference" always uses its op, never autograd, even for few samples."""
    _without_autograd(monkeypatch)
    return request.param


@pytest.fixture(params=[*IMPLS, "the reference's op"])
def each_impl(request, monkeypatch):
    """Like ``impl``, and additionally the reference's op."""
    if request.param in IMPLS:
        return request.param
    _without_autograd(monkeypatch)
    return "reference"


def _without_autograd(monkeypatch):
    for module in (few_scores, of_byol):
        monkeypatch.setattr(module, "takes", lambda *_: False)


@pytest.fixture(scope="session")
def ranks():
    """Two processes that form a group, for all modules that need no more: most of what they take is their start."""
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of threads after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Make ``torch.empty`` return NaN (or the largest integer), so that elements never written are noticed."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def counted_time(monkeypatch):
    """Make ``time.sleep`` return at once and advance the profile's CPU clock, which nothing else advances."""
    clock = CountedTime()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(CPUClock, "read", staticmethod(clock.read))
    return clock
