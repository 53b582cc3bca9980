"""Builds the C++ extension where it can, a pure-Python package where it cannot (and records why).

SELFSUP_KERNELS_REQUIRE_EXTENSION=1 makes a failed build an error; SELFSUP_KERNELS_SKIP_BUILD=1 asks for pure Python;
SELFSUP_KERNELS_SANITIZE=1 builds with AddressSanitizer and UBSan.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).resolve().parent / "selfsup_kernels"


def _module(name):
    """A module of the package, without importing the package (which would need torch)."""
    spec = importlib.util.spec_from_file_location(name, PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _module("_build")
version = _module("version").__version__


def _record(command, in_place, **facts):
    """Write the record beside the library: into the source tree, or into what becomes the wheel."""
    folder = PACKAGE if in_place else Path(command.build_lib) / PACKAGE.name
    folder.mkdir(parents=True, exist_ok=True)
    build.write_record(folder, version=version, **facts)


def _give_up(command, in_place, reason):
    if build.environment_flag("SELFSUP_KERNELS_REQUIRE_EXTENSION"):
        raise SystemExit(f"selfsup_kernels: {reason}")
    print(f"selfsup_kernels: pure-Python install: {reason}", file=sys.stderr)
    _record(command, in_place, failure=reason)


def _pure_python(reason):
    class BuildPy(build_py):
        def run(self):
            super().run()
            _give_up(self, self.editable_mode, reason)

    return {"cmdclass": {"build_py": BuildPy}}


def _extension():
    if build.environment_flag("SELFSUP_KERNELS_SKIP_BUILD"):
        return _pure_python("SELFSUP_KERNELS_SKIP_BUILD was set.")
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        return _pure_python(
            f"the build could not import {error.name}. Install torch, pybind11 and ninja, and build with"
            " --no-build-isolation, so that the extension is built against the torch that it will run with."
        )
    sanitize = build.environment_flag("SELFSUP_KERNELS_SANITIZE")

    class Build(BuildExtension):
        """A build that fails softly, and records what it was made of."""

        def run(self):
            in_place = bool(self.inplace or self.editable_mode)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                _give_up(self, in_place, f"the C++ compiler failed or is missing ({type(error).__name__}: {error}).")
                self.extensions = []
                return
            flags = " ".join(build.COMPILE_FLAGS)
            target = build.TORCH_TARGET_VERSION
            _record(self, in_place, torch=torch.__version__, torch_target=target, flags=flags, sanitized=sanitize)

    include_dirs = [*include_paths(), pybind11.get_include()]
    extension = build.extension(Extension, include_dirs, library_paths(), sanitize=sanitize)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(version=version, **_extension())
