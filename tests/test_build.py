"""Test the build: its record, its messages if it cannot compile, and which libraries the loader refuses."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import EXTENSION_REQUIRED

import selfsup_kernels
from selfsup_kernels.core import backends, build, validate

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, selfsup_kernels, selfsup_kernels.backends as b
x = torch.randn(2, 8, 4, requires_grad=True)
selfsup_kernels.info_nce_loss(x).backward()
print(selfsup_kernels.__file__, b.select("auto", x))
"""


@pytest.fixture
def tree(tmp_path):
    """Copy the source tree without the files of earlier builds."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    left = shutil.ignore_patterns("*.so", "_build_info.json", "_kernels.zip", "__pycache__")
    for name in ("selfsup_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=left)
    return copy


def run(tree, *arguments, **environment):
    """Run Python in ``tree`` with its copy of the package, and without build settings from the environment."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("SELFSUP_KERNELS_") and k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=base | environment, capture_output=True, text=True
    )


def recorded(tree):
    return json.loads((tree / "selfsup_kernels" / "_build_info.json").read_text())


def failed(tree, built):
    """Return the last lines of a failed build; assert that it left neither a library nor a record."""
    assert built.returncode != 0, built.stdout
    assert not list(tree.rglob("_C.*.so"))
    assert not list(tree.rglob("_build_info.json"))
    said = built.stderr[built.stderr.rindex("selfsup_kernels: ") :].strip().splitlines()
    assert built.stderr.strip().endswith(said[-1])
    assert "Traceback" not in built.stderr
    return said


def test_the_extension_is_here_where_it_is_required():
    """`make test` requires the extension, so that tests of the C++ kernels are not skipped unnoticed."""
    assert backends.unavailable("cpu") is None or not EXTENSION_REQUIRED


def test_the_record_describes_the_build():
    facts = build.record()
    if backends.unavailable("cpu") is not None:
        assert facts.get("failure", True)
        return
    assert facts["version"] == selfsup_kernels.__version__
    assert facts["platform"] == f"{sys.platform} {platform.machine()}"
    assert facts["torch_target"] == build.TORCH_TARGET_VERSION
    assert {"torch", "python", "flags", "sanitized"} <= set(facts)
    module, _ = backends.load_extension()
    assert module.build_info()["torch_target"] == build.TORCH_TARGET_VERSION
    assert module.cpu_capability() in ("default", "avx2", "avx512")


def build_in_place(tree, **environment):
    return run(tree, "setup.py", "build_ext", "--inplace", **environment)


def test_without_a_compiler(tree, tmp_path):
    """Without a compiler on PATH, as in a slim image, the message names the package manager's command."""
    built = build_in_place(tree, CXX="/nowhere/c++")
    why, command = failed(tree, built)
    assert why == "selfsup_kernels: no C++ compiler: /nowhere/c++ is not on PATH."
    assert re.fullmatch(r"Type: CXX=(g|clang|c)\+\+ pip install --no-build-isolation \.", command)

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").symlink_to("/bin/true")
    why, command = failed(tree, build_in_place(tree, PATH=str(tools), CXX="g++"))
    assert "g++ is not on PATH" in why
    assert re.fullmatch(
        r"Type: apt-get update && apt-get install -y g\+\+ && pip install --no-build-isolation \.",
        command,
    )


def test_without_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    why, first = build.cannot_compile()
    assert f"{tmp_path}/Python.h" in why
    assert first == "dnf install -y python3-devel && "


@pytest.mark.parametrize("killed", [False, True])
def test_a_compiler_that_fails(tree, tmp_path, killed):
    """The last lines show the compiler's error, after all output of ninja, and what to type."""
    compiler = tmp_path / "g++"
    last = "g++: fatal error: Killed signal terminated program cc1plus" if killed else "a.cpp:3:1: error: no such thing"
    compiler.write_text(
        f"#!/bin/sh\ncase \"$*\" in *-dump*) echo 12.2.0 ;; *) echo noise >&2; echo '{last}' >&2; exit 1 ;; esac\n"
    )
    compiler.chmod(0o755)
    said = failed(tree, build_in_place(tree, CC=str(compiler), CXX=str(compiler), MAX_JOBS="1"))
    needs = "" if killed else " (GCC 11, Clang 14 or later is needed)"
    assert said[0] == f"selfsup_kernels: the C++ compiler {compiler} failed{needs}:"
    assert said[1] == f"  {last}"
    assert re.match(
        "Type: MAX_JOBS=1 pip install" if killed else r"Type: CXX=(g|clang)\+\+(-\d+)? pip install", said[-2]
    )
    assert said[-1].endswith("SELFSUP_KERNELS_SKIP_BUILD=1 pip install --no-build-isolation .")


def test_another_compiler_is_one_that_is_here_or_can_be_installed(monkeypatch, tmp_path):
    for name in ("g++", "g++-12", "clang++-14"):
        (tmp_path / name).touch()
    paths = {"c++": tmp_path / "g++-12", "g++-12": tmp_path / "g++-12"}
    monkeypatch.setattr(build.shutil, "which", lambda name: paths.get(name) and str(paths[name]))
    monkeypatch.setattr(build.os, "geteuid", lambda: 0)
    monkeypatch.setenv("CXX", "c++")
    assert build.another_compiler() == "install Clang 14 or later, then CXX=clang++ "
    paths["dnf"] = tmp_path
    assert build.another_compiler() == "dnf install -y clang && CXX=clang++ "
    paths["c++"] = paths["clang++"] = tmp_path / "clang++-14"
    assert build.another_compiler() == "CXX=g++-12 "
    del paths["g++-12"]
    assert build.another_compiler() == "dnf install -y gcc-c++ && CXX=g++ "
    paths |= {"c++": tmp_path / "g++-12", "g++-12": tmp_path / "g++-12"}
    paths["clang++-14"] = tmp_path / "clang++-14"
    assert build.another_compiler() == "CXX=clang++-14 "


HIDES = "import sys, runpy; sys.modules[{name!r}] = None; sys.argv = ['setup.py', 'build']; runpy.run_path('setup.py')"


@pytest.mark.parametrize("name", ["torch", "pybind11"])
def test_without_a_package_that_the_build_needs(tree, name):
    why, command = failed(tree, run(tree, "-c", HIDES.format(name=name)))
    assert f"the build needs {name}" in why
    assert command.startswith("Type: pip install 'torch>=2.11' pybind11 ninja 'setuptools>=77' wheel && pip install ")


def test_an_isolated_build_finds_the_torch_of_the_environment(tree):
    """pip removes the environment's packages from the path of an isolated build."""
    build = f"""
import sys, site, runpy
import setuptools, wheel, pybind11
site.getsitepackages = lambda: {[p for p in sys.path if p.endswith("site-packages")]!r}
sys.path = [p for p in sys.path if not p.endswith("site-packages")]
sys.argv = ["setup.py", "build"]
runpy.run_path("setup.py")
"""
    why, command = failed(tree, run(tree, "-c", build, CXX="/nowhere/c++"))
    assert "no C++ compiler" in why  # it does not complain about a missing torch
    assert re.fullmatch(r"Type: CXX=\S+ pip install \.", command)


def test_an_isolated_build_does_not_download_torch():
    requires = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in requires


def test_wheel_of_the_pure_python_package(tree):
    arguments = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "-w", "dist", ".")
    built = run(tree, *arguments, SELFSUP_KERNELS_SKIP_BUILD="1")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    unpacked = tree / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    # Modules and their data files: templates, schemas, the table of tile shapes.
    files = {str(p.relative_to(tree)) for p in (tree / "selfsup_kernels").rglob("*") if p.is_file()}
    needed = {name for name in files if "__pycache__" not in name and not name.endswith("_build_info.json")}
    assert needed <= names
    assert {"selfsup_kernels/py.typed", "selfsup_kernels/tiles/configs.json"} <= names
    assert not any(name.startswith(("tests", "csrc", "benchmarks")) for name in names)
    reason = "SELFSUP_KERNELS_SKIP_BUILD was set"
    assert reason in recorded(unpacked)["failure"]
    assert not list(unpacked.rglob("*.so"))
    used = run(unpacked, "-c", USE)
    assert used.stdout.split() == [str(unpacked / "selfsup_kernels" / "__init__.py"), "reference"], used.stderr
    assert used.stderr.count("RuntimeWarning: selfsup_kernels: CPU tensors go through eager PyTorch") == 1
    assert f"{reason} at the install. Run: pip install --force-reinstall --no-deps ." in used.stderr
    info = run(unpacked, "-m", "selfsup_kernels", "info")
    assert info.returncode == 0, info.stderr
    assert reason in info.stdout
    assert "run: pip install --force-reinstall" in info.stdout
    assert not info.stderr


def test_a_fallback_warns_once_and_not_while_compile_traces(monkeypatch):
    monkeypatch.setattr(backends, "_reasons", backends._reasons | {"cpu": backends.Unavailable("No kernels.", "make")})
    monkeypatch.setattr(validate, "_warned", set())
    views = torch.ones(2, 2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(lambda v: selfsup_kernels.info_nce_loss(v), backend="eager", fullgraph=True)(views)
        assert not [w for w in caught if "selfsup_kernels" in str(w.message)]
        for _ in range(2):
            selfsup_kernels.info_nce_loss(views)
            selfsup_kernels.byol_loss(views, views)
        selfsup_kernels.info_nce_loss(views, impl="reference")
    (warning,) = [w for w in caught if "selfsup_kernels" in str(w.message)]
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    assert str(warning.message).endswith("No kernels. Run: make")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.1"}, "is of version 0.0.1"),
        ({"interface": "that of other sources"}, "built from other sources"),
        ({"platform": "plan9 vax"}, "Built for .*plan9 vax; you have torch"),
        ({"failure": "no compiler."}, "no compiler"),
        (None, "has no build record"),
    ],
)
def test_a_library_that_does_not_fit_is_refused(monkeypatch, tmp_path, change, message):
    fits = {"version": selfsup_kernels.__version__, "torch": torch.__version__, "interface": build.interface()}
    monkeypatch.setattr(build, "RECORD", tmp_path / "_build_info.json")
    build.write_record(tmp_path, **fits)
    assert build.mismatch() is None
    facts = fits | build.machine() | (change or {})
    (tmp_path / "_build_info.json").write_text(json.dumps(facts) if change else "not JSON")
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(build.mismatch())


def test_a_torch_that_is_too_old_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "RECORD", tmp_path / "_build_info.json")
    build.write_record(tmp_path, version=selfsup_kernels.__version__, torch="2.13.0")
    for version, fits in [("2.10.1", False), ("1.13.0+cu117", False), ("2.11.0a0+git1", True), ("3.0.0", True)]:
        monkeypatch.setattr(torch, "__version__", version)
        assert (build.mismatch() is None) == fits
        if not fits:
            assert "2.11 or later is needed. Built for torch 2.13.0" in build.mismatch()
            assert f"you have torch {version}" in build.mismatch()
