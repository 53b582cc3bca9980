"""Run selected tests on the narrower instruction sets of this processor; all other tests use the widest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import IMPLS

TESTS = Path(__file__).parent
VARIABLE = "SELFSUP_KERNELS_CPU_CAPABILITY"
SELECTED = "cpu and (against_loops or near_zero or zero_rows or layouts or pairs or low_precision_labels)"
FILES = ["test_info_nce.py", "test_info_nce_precision.py", "test_byol.py", "test_memory_layout.py"]


@pytest.mark.parametrize("capability", ["avx2", "default"] if "cpu" in IMPLS else [])
def test_narrower_instruction_sets(capability):
    # One thread, since other tests keep the cores busy.
    unset = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments, environment=unset | {VARIABLE: capability}):
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True
        )

    ask = ("-c", "import torch; from selfsup_kernels import _C; print(_C.cpu_capability())")
    answers = [run(*ask), run(*ask, environment=unset)]
    assert not any(answer.returncode for answer in answers), answers
    used, widest = (answer.stdout.strip() for answer in answers)
    order = ["default", "avx2", "avx512"]
    assert used == min(capability, widest, key=order.index)
    if used != widest:
        tests = run("-m", "pytest", "-x", "-k", SELECTED, *(str(TESTS / name) for name in FILES))
        assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]
