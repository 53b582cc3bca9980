"""The build: what it records, what the loader refuses, and that no compiler means a working pure-Python package."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import EXTENSION_REQUIRED

import selfsup_kernels
from selfsup_kernels import _build, backends

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, selfsup_kernels, selfsup_kernels.backends as b
x = torch.randn(2, 8, 4, requires_grad=True)
selfsup_kernels.info_nce_loss(x).backward()
print(selfsup_kernels.__file__, b.select("auto", x))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree without what earlier builds left."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    left = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("selfsup_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=left)
    return copy


def run(tree, *arguments, **environment):
    """Python in ``tree``, seeing its package and no other copy; by default nothing is required of the build."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("SELFSUP_KERNELS_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=base | environment, capture_output=True, text=True
    )


def recorded(tree):
    return json.loads((tree / "selfsup_kernels" / "_build_info.json").read_text())


def assert_works_in_python(tree, reason):
    assert reason in recorded(tree)["failure"]
    assert not list(tree.rglob("*.so"))
    used = run(tree, "-c", USE)
    assert used.stdout.split() == [str(tree / "selfsup_kernels" / "__init__.py"), "reference"], used.stderr
    info = run(tree, "-m", "selfsup_kernels", "info")
    assert info.returncode == 0, info.stderr
    text = " ".join(info.stdout.split())
    assert reason in text
    assert "pip install" in text


def test_the_extension_is_here_where_it_is_required():
    """`make test` requires it, so that no test of the C++ kernels is left out unseen."""
    assert backends.unavailable("cpu") is None or not EXTENSION_REQUIRED


def test_the_record_says_what_was_built():
    facts = _build.record()
    if backends.unavailable("cpu") is not None:
        assert facts.get("failure", True)
        return
    assert facts["version"] == selfsup_kernels.__version__
    assert facts["platform"] == f"{sys.platform} {platform.machine()}"
    assert facts["torch_target"] == _build.TORCH_TARGET_VERSION
    assert {"torch", "python", "flags", "sanitized"} <= set(facts)
    module, _ = backends.load_extension()
    assert module.build_info()["torch_target"] == _build.TORCH_TARGET_VERSION
    assert module.cpu_capability() in ("default", "avx2", "avx512")


def test_without_a_compiler(tree):
    built = run(tree, "setup.py", "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false")
    assert built.returncode == 0, built.stderr
    assert "pure-Python install" in built.stderr
    assert_works_in_python(tree, "the C++ compiler failed or is missing")


def test_with_no_compiler_on_the_path(tree, tmp_path):
    """As on a slim image: no g++ at all, and none named."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ninja").symlink_to(shutil.which("ninja", path=Path(sys.executable).parent) or "/bin/true")
    for tool in ("which", "sh"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    environment["PATH"] = str(tmp_path / "bin")
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={k: v for k, v in environment.items() if not k.startswith("SELFSUP_KERNELS_")},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert_works_in_python(tree, "the C++ compiler failed or is missing")


def test_without_torch_while_building(tree):
    """What an isolated ``pip install .`` sees: nothing is fetched for the build, and the record says how to mend it."""
    build = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build']; runpy.run_path('setup.py')"
    )
    built = run(tree, "-c", build)
    assert built.returncode == 0, built.stderr
    (library,) = (tree / "build").glob("lib*")
    facts = recorded(library)
    assert "could not import torch" in facts["failure"]
    assert "--no-build-isolation" in facts["failure"]
    assert not (tree / "selfsup_kernels" / "_build_info.json").exists()
    requires = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in requires


def test_a_required_extension_that_does_not_build_is_an_error(tree):
    environment = {"CC": "/bin/false", "CXX": "/bin/false", "SELFSUP_KERNELS_REQUIRE_EXTENSION": "1"}
    built = run(tree, "setup.py", "build_ext", "--inplace", **environment)
    assert built.returncode != 0
    assert "the C++ compiler failed or is missing" in built.stderr
    assert not (tree / "selfsup_kernels" / "_build_info.json").exists()


def test_wheel_of_the_pure_python_package(tree):
    arguments = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "-w", "dist", ".")
    built = run(tree, *arguments, SELFSUP_KERNELS_SKIP_BUILD="1")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    unpacked = tree / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    # Modules, and what they read: templates, schemas, the table of tile shapes.
    files = {str(p.relative_to(tree)) for p in (tree / "selfsup_kernels").rglob("*") if p.is_file()}
    needed = {name for name in files if "__pycache__" not in name and not name.endswith("_build_info.json")}
    assert needed <= names
    assert {"selfsup_kernels/py.typed", "selfsup_kernels/triton/configs.json"} <= names
    assert not any(name.startswith(("tests", "csrc", "benchmarks")) for name in names)
    assert_works_in_python(unpacked, "SELFSUP_KERNELS_SKIP_BUILD was set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.1"}, "is of version 0.0.1"),
        ({"platform": "plan9 vax"}, "Built for .*plan9 vax; you have torch"),
        ({"failure": "no compiler."}, "no compiler"),
        (None, "no build was attempted"),
    ],
)
def test_a_library_that_does_not_fit_is_refused(monkeypatch, tmp_path, change, message):
    fits = {"version": selfsup_kernels.__version__, "torch": torch.__version__}
    monkeypatch.setattr(_build, "RECORD", tmp_path / "_build_info.json")
    _build.write_record(tmp_path, **fits)
    assert _build.mismatch() is None
    facts = fits | _build.machine() | (change or {})
    (tmp_path / "_build_info.json").write_text(json.dumps(facts) if change else "not JSON")
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(_build.mismatch())


def test_a_torch_that_is_too_old_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "RECORD", tmp_path / "_build_info.json")
    _build.write_record(tmp_path, version=selfsup_kernels.__version__, torch="2.13.0")
    for version, fits in [("2.10.1", False), ("1.13.0+cu117", False), ("2.11.0a0+git1", True), ("3.0.0", True)]:
        monkeypatch.setattr(torch, "__version__", version)
        assert (_build.mismatch() is None) == fits
        if not fits:
            assert "2.11 or later is needed. Built for torch 2.13.0" in _build.mismatch()
            assert f"you have torch {version}" in _build.mismatch()
