"""pytest-benchmark: the two-view InfoNCE loss, forward, backward and both, against eager PyTorch and torch.compile."""

import pytest

from selfsup_kernels.lab.bench import rivals
from selfsup_kernels.lab.bench.workloads import PARTS, case

CASES = [case("info_nce", batch=b, dim=d) for b, d in ((256, 128), (1024, 128), (4096, 128), (2048, 512))]


@pytest.mark.parametrize("name", ["eager", "compile", rivals.OURS])
@pytest.mark.parametrize("made", CASES, ids=lambda made: f"B{made.batch}-D{made.dim}")
@pytest.mark.parametrize("part", PARTS)
def test_info_nce(measure, part, made, name):
    measure(made, part, name, rounds=3 if made.batch >= 2048 else 15)
