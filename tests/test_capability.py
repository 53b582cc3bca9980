"""Every instruction set that this processor has, not only the widest, which the other tests run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import IMPLS

TESTS = Path(__file__).parent
SELECTED = "cpu and (against_loops or near_zero or zero_rows or layouts or pairs or low_precision_labels)"
FILES = ["test_info_nce.py", "test_info_nce_precision.py", "test_byol.py", "test_memory_layout.py"]


@pytest.mark.parametrize("capability", ["avx2", "default"] if "cpu" in IMPLS else [])
def test_narrower_instruction_sets(capability):
    from selfsup_kernels import _C

    order = ["default", "avx2", "avx512"]
    expected = min(capability, _C.cpu_capability(), key=order.index)
    # One thread: the cores are busy with the tests around this one as well.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SELFSUP_KERNELS_CPU_CAPABILITY": capability}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True
        )

    used = run("-c", "import torch; from selfsup_kernels import _C; print(_C.cpu_capability())")
    assert used.stdout.strip() == expected, used.stderr
    tests = run("-m", "pytest", "-x", "-k", SELECTED, *(str(TESTS / name) for name in FILES))
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]
