"""Who imports whom, and what ``import selfsup_kernels`` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import selfsup_kernels

PACKAGE = Path(selfsup_kernels.__file__).parent
ENTRANCES = ("__main__.py", "profile.py")
"""Files that hand a user over to the lab."""


def imported(path):
    """The modules of the package that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_outside_the_lab_imports_it():
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    outside = [path for path in files if path.parts[0] != "lab" and path.as_posix() not in ENTRANCES]
    assert len(outside) > 20
    found = {str(path) for path in outside for name in imported(PACKAGE / path) if f"{name}.".startswith(LAB)}
    assert not found
    assert any(f"{name}.".startswith(LAB) for name in imported(PACKAGE / "profile.py"))  # this test can fail


LAB = "selfsup_kernels.lab."


def modules_of(code):
    """The modules that ``code`` loads beyond those of ``import torch``, in a process of its own."""
    script = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout.split()


def test_import_loads_little_more_than_torch():
    """``torch._dynamo`` alone doubles the time. The time itself: ``benchmarks/bench_import.py``."""
    loaded = modules_of("import selfsup_kernels")
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "sympy", "triton"))]
    assert not [name for name in loaded if name.startswith(LAB)]
    assert len([name for name in loaded if not name.startswith("selfsup_kernels")]) < 10, loaded


def test_the_profiler_is_loaded_when_it_is_first_used():
    loaded = modules_of("import selfsup_kernels as sk; assert sk.profile.steps")
    assert "selfsup_kernels.lab.profile.steps" in loaded
    assert "selfsup_kernels.lab.profile.steps" in modules_of("from selfsup_kernels.profile import steps")
