"""Check an installed wheel: nothing here can compile, both libraries load, and kernels for GPUs are launched without
Triton, on the stub driver of a folder. Usage: installed.py FOLDER"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import selfsup_kernels
from selfsup_kernels.core import backends


def main(folder):
    found = [name for name in ("c++", "g++", "gcc", "cc", "clang++", "nvcc", "ninja") if shutil.which(name)]
    assert not found, f"PATH has {found}"
    assert importlib.util.find_spec("triton") is None
    package = Path(selfsup_kernels.__file__).parent
    assert package.is_relative_to(sys.prefix), package
    assert backends.unavailable("cpu") is None, backends.unavailable("cpu")
    if torch.version.cuda is not None:
        path, why = backends.load_cuda()
        assert path == package / "_CUDA.so", why

    script = Path(__file__).parents[1] / "gpu" / "stub_driver" / "without_triton.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)["launches"]
    assert launches[0] == launches[1] != 0, launches
    print(f"torch {torch.__version__}: {package} has its kernels; {launches[0]} launches for a loss and its gradient")


main(sys.argv[1])
