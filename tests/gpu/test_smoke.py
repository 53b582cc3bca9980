"""The calls that compute-sanitizer is run on: the reads that its initcheck would report, seen in the interpreter, where
unwritten memory is NaN or the largest integer (``poisoned_memory``)."""

import numpy as np
import pytest
import torch
from helpers import benchmarks_script

pytest.importorskip("triton")
from selfsup_kernels.tiles import launcher

pytestmark = pytest.mark.skipif(not launcher.INTERPRETED, reason="needs TRITON_INTERPRET=1")

gpu_check = benchmarks_script("gpu_check")


@pytest.fixture
def unwritten(monkeypatch):
    """The kernels that have read unwritten memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    found, launch, running = set(), launcher.launch, []

    def record(kernel, grid, *args, **options):
        running[:] = [kernel.__name__]
        launch(kernel, grid, *args, **options)

    def watched(name):
        method = getattr(InterpreterBuilder, name)

        def call(self, pointers, *args, **options):
            result = method(self, pointers, *args, **options)
            data = np.asarray(result.data)
            if data.dtype == np.uint16:  # bfloat16, as the interpreter has it
                poison = data == 0x7FC0
            else:
                poison = np.isnan(data) if data.dtype.kind == "f" else data == np.iinfo(data.dtype).max
            read = args[0].data if name == "create_masked_load" else True
            if (poison & np.asarray(read).astype(bool)).any():
                found.add(running[0])
            return result

        monkeypatch.setattr(InterpreterBuilder, name, call)

    for name in ("create_masked_load", "create_atomic_rmw", "create_atomic_cas"):
        watched(name)
    monkeypatch.setattr(launcher, "launch", record)
    # The calls switch it on and off; memory has to be poisoned all the time.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only=False: None)
    monkeypatch.setattr(launcher, "deterministic", lambda: False)
    return found


def test_calls_for_initcheck_read_what_was_written(unwritten):
    for initcheck in (False, True):
        unwritten.clear()
        (call,) = (call for name, call in gpu_check.calls(initcheck) if "x300 labels" in name)
        assert all(bool(x.isfinite().all()) for x in call(device=torch.device("cpu")))
        assert unwritten == (set() if initcheck else {"product_kernel"})
