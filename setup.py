"""Builds the C++ extension where it can, a pure-Python package where it cannot (and records why).

SELFSUP_KERNELS_REQUIRE_EXTENSION=1 makes a failed build an error; SELFSUP_KERNELS_SKIP_BUILD=1 asks for pure Python;
SELFSUP_KERNELS_SANITIZE=1 builds with AddressSanitizer and UBSan.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent


def _module(name):
    """A module of the package, without importing the package (which would need torch)."""
    spec = importlib.util.spec_from_file_location(name, HERE / "selfsup_kernels" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _module("_build")
version = _module("version").__version__
required = build.environment_flag("SELFSUP_KERNELS_REQUIRE_EXTENSION")


def _give_up(reason):
    if required:
        raise SystemExit(f"selfsup_kernels: {reason}")
    print(f"selfsup_kernels: pure-Python install: {reason}", file=sys.stderr)
    build.write_record(failure=reason, version=version, **build.machine())
    return {}


def _extension():
    if build.environment_flag("SELFSUP_KERNELS_SKIP_BUILD"):
        return _give_up("SELFSUP_KERNELS_SKIP_BUILD was set.")
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        return _give_up(
            f"the build could not import {error.name}. Install torch, pybind11 and ninja, and build with"
            " --no-build-isolation, so that the extension is built against the torch that it will run with."
        )

    class Build(BuildExtension):
        """A build that fails softly, and records what it was made of."""

        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                _give_up(f"the C++ compiler failed or is missing ({type(error).__name__}: {error}).")
                self.extensions = []
                return
            build.write_record(
                version=version,
                torch=torch.__version__,
                torch_target=build.TORCH_TARGET_VERSION,
                flags=" ".join(build.COMPILE_FLAGS),
                sanitized=sanitize,
                **build.machine(),
            )
            # For a wheel the record travels beside the library.
            if not self.inplace:
                target = Path(self.build_lib) / "selfsup_kernels" / build.RECORD.name
                target.write_text(build.RECORD.read_text())

    sanitize = build.environment_flag("SELFSUP_KERNELS_SANITIZE")
    extension = build.extension(
        Extension, [*include_paths(), pybind11.get_include()], library_paths(), sanitize=sanitize
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(version=version, **_extension())
