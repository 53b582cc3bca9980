"""Tests of the GPU kernels. They run on the GPU where there is one, and with TRITON_INTERPRET=1 on the CPU.

Interpreted kernels are right in float32 alone, and slow: such runs are small. What needs a real GPU is marked `cuda`.
"""

import pytest
import torch

from selfsup_kernels import backends

INTERPRETED = backends.triton_is_interpreted()


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    neither = pytest.mark.skip(reason="needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    for item in items:
        if "gpu" not in item.path.parts[-2:]:
            continue
        if item.get_closest_marker("cuda") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(no_gpu)
        elif not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(neither)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    if INTERPRETED and request.param != torch.float32:
        pytest.skip("the interpreter is right in float32 alone")
    return request.param
