"""pytest-benchmark: the BYOL loss on pairs, forward and forward + backward."""

import pytest
import workloads as w


@pytest.mark.parametrize("name", w.BYOL)
@pytest.mark.parametrize("shape", w.BYOL_SHAPES, ids=lambda s: f"B{s[0]}-D{s[1]}")
@pytest.mark.parametrize("part", ["forward", "both"])
def test_byol(benchmark, part, shape, name):
    benchmark.group = f"byol {part} B{shape[0]}-D{shape[1]}"
    function, inputs = w.BYOL[name], w.byol_inputs(*shape)
    w.both(function, inputs)
    benchmark.pedantic(w.forward if part == "forward" else w.both, args=(function, inputs), rounds=9)
