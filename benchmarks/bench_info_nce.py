"""pytest-benchmark: the two-view InfoNCE loss, forward, backward and both, against eager PyTorch and torch.compile."""

import pytest
import workloads as w


def _shape(shape):
    return f"B{shape[0]}-D{shape[1]}"


@pytest.mark.parametrize("name", w.INFO_NCE)
@pytest.mark.parametrize("shape", w.INFO_NCE_SHAPES, ids=_shape)
@pytest.mark.parametrize("part", ["forward", "backward", "both"])
def test_info_nce(benchmark, part, shape, name):
    benchmark.group = f"info_nce {part} {_shape(shape)}"
    function, inputs = w.INFO_NCE[name], w.info_nce_inputs(*shape)
    w.both(function, inputs)  # compiles, warms up
    rounds = 3 if shape[0] >= 2048 else 15
    if part == "forward":
        benchmark.pedantic(w.forward, args=(function, inputs), rounds=rounds)
    elif part == "both":
        benchmark.pedantic(w.both, args=(function, inputs), rounds=rounds)
    else:

        def graph():
            w.clear(inputs)
            return (function(*inputs),), {}

        benchmark.pedantic(lambda loss: loss.backward(), setup=graph, rounds=rounds)
