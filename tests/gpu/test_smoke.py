"""Run in the interpreter the calls that compute-sanitizer runs on a GPU."""

import pytest
import torch
from helpers import benchmarks_script

pytest.importorskip("triton")
from selfsup_kernels.tiles import launcher

pytestmark = pytest.mark.skipif(not launcher.INTERPRETED, reason="needs TRITON_INTERPRET=1")

gpu_check = benchmarks_script("gpu_check")


@pytest.mark.parametrize("initcheck", [False, True])
def test_a_call_is_finite(initcheck):
    (call,) = (call for name, call in gpu_check.calls(initcheck) if "x300 labels" in name)
    assert all(bool(x.isfinite().all()) for x in call(device=torch.device("cpu")))
