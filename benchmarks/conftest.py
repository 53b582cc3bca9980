import functools
import sys
from pathlib import Path

import pytest

from selfsup_kernels.lab.bench import rivals

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def measure(benchmark):
    """``measure(case, part, name, rounds)``: one column of the workload under pytest-benchmark, a warm-up before."""

    def run(made, part, name, rounds):
        benchmark.group = f"{made.label} {part}"
        inputs = made.inputs()
        function, reason = rivals.load(made, name, inputs)
        if reason:
            pytest.skip(reason)
        made.run(part, function, inputs)
        benchmark.pedantic(
            functools.partial(made.work, part, function),
            setup=lambda: ((made.prepare(part, function, inputs),), {}),
            rounds=rounds,
        )

    return run
