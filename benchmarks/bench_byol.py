"""pytest-benchmark: the BYOL loss of two views, forward and forward + backward."""

import pytest

from selfsup_kernels.lab.bench import rivals
from selfsup_kernels.lab.bench.workloads import case

CASES = [case("byol", batch=batch) for batch in (4096, 32768)]


@pytest.mark.parametrize("name", ["eager", "compile", rivals.OURS])
@pytest.mark.parametrize("made", CASES, ids=lambda made: f"B{made.batch}-D{made.dim}")
@pytest.mark.parametrize("part", ["forward", "both"])
def test_byol(measure, part, made, name):
    measure(made, part, name, rounds=9)
