"""Test which modules import which, and what ``import selfsup_kernels`` loads."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import selfsup_kernels

LAB = "selfsup_kernels.lab."
PACKAGE = Path(selfsup_kernels.__file__).parent
ENTRANCES = ("__main__.py", "profile.py")
"""Files outside the lab that may import it."""


def imported(path, anywhere=True):
    """Yield the modules that a file imports: anywhere, or only at its top level, that is when it is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
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


LAYERS = (
    "core",
    "spec info_nce siglip byol ema tiles",
    "methods chunked functional modules optim backends",
    "compat",
    "lab",
)
"""A part imports only parts of its own layer or an earlier one."""


def layer(part):
    return next((i for i, parts in enumerate(LAYERS) if part in parts.split()), None)


def test_imports_run_downwards():
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    upwards, between = set(), {}
    for relative, path in files.items():
        part = relative.with_suffix("").parts[0]
        name = ".".join(("selfsup_kernels", *relative.with_suffix("").parts)).removesuffix(".__init__")
        top = {x for x in imported(path, anywhere=False) if x.startswith("selfsup_kernels.")}
        between[name] = top
        if layer(part) is None or relative.name in ENTRANCES:
            continue
        for other in top:
            reached = layer(other.split(".")[1])
            if reached is not None and reached > layer(part):
                upwards.add((name, other))
    assert not upwards
    modules = {name: top & set(between) for name, top in between.items()}
    for top in modules.values():  # `from package import module` depends on the module, not on the package
        top -= {name for name in top if any(other.startswith(f"{name}.") for other in top)}
    graphlib.TopologicalSorter(modules).prepare()  # raises where modules import each other in a circle


def modules_of(code):
    """Return the modules that ``code`` loads in addition to ``import torch``, in a separate process."""
    script = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout.split()


def test_import_loads_little_more_than_torch():
    """The import loads few modules; ``torch._dynamo`` alone would double its time."""
    loaded = modules_of("import selfsup_kernels")
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "sympy", "triton"))]
    assert not [name for name in loaded if name.startswith(LAB)]
    assert len([name for name in loaded if not name.startswith("selfsup_kernels")]) < 10, loaded


def test_the_profiler_is_loaded_when_it_is_first_used():
    loaded = modules_of("import selfsup_kernels as sk; assert sk.profile.steps")
    assert "selfsup_kernels.lab.profile.steps" in loaded
    assert "selfsup_kernels.lab.profile.steps" in modules_of("from selfsup_kernels.profile import steps")
