"""What ``import selfsup_kernels`` takes beside ``import torch``, each in a fresh process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["torch", "selfsup_kernels"])
def test_import(benchmark, module):
    benchmark.group = "import"
    command = [sys.executable, "-c", f"import {module}"]
    benchmark.pedantic(subprocess.run, (command,), {"check": True}, rounds=5, warmup_rounds=1)
