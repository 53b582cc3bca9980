"""pytest-benchmark: the moving average over ResNet-50's parameters."""

import pytest
import torch
import workloads as w

CASES = [(dtype, name) for dtype, rivals in w.EMA.items() for name in rivals]


@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_ema(benchmark, dtype, name):
    benchmark.group = f"ema resnet50 float32 <- {dtype}"
    inputs = w.ema_inputs(getattr(torch, dtype))
    w.EMA[dtype][name](*inputs)
    benchmark.pedantic(w.EMA[dtype][name], args=inputs, rounds=15)
