"""pytest-benchmark: the moving average over ResNet-50's parameters."""

import pytest

from selfsup_kernels.lab.bench import rivals
from selfsup_kernels.lab.bench.workloads import case


@pytest.mark.parametrize("name", [*rivals.EAGER_EMA, rivals.OURS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ema(measure, dtype, name):
    measure(case("ema", dtype=dtype), "update", name, rounds=15)
