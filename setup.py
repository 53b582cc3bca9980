"""Builds the C++ extension where it can, a pure-Python package where it cannot (and records why).

Beside a CUDA build of torch, and where there is a CUDA toolkit of its major version, also the CUDA library.

SELFSUP_KERNELS_REQUIRE_EXTENSION=1 makes a build that fails an error; SELFSUP_KERNELS_SKIP_BUILD=1 asks for pure
Python, SELFSUP_KERNELS_SKIP_CUDA_BUILD=1 for no CUDA library; FORCE_CUDA=1 builds that one beside any torch, or is an
error; TORCH_CUDA_ARCH_LIST says for which GPUs; MAX_JOBS how many compilers run at once. SELFSUP_KERNELS_SANITIZE=1
builds the extension with AddressSanitizer and UBSan. ``python setup.py build_cuda`` builds the CUDA library alone, in
place.
"""

import importlib.util
import sys
from pathlib import Path

import setuptools
from setuptools import Command, Distribution, Extension, setup
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).resolve().parent / "selfsup_kernels"


def _module(name):
    """A module of the package, without importing the package (which would need torch)."""
    spec = importlib.util.spec_from_file_location(name, PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _module("_build")
build_cuda = _module("_build_cuda")
version = _module("version").__version__


def _folder(command, in_place):
    """Where libraries and the record go: the source tree, or what becomes the wheel."""
    return PACKAGE if in_place else Path(command.build_lib) / PACKAGE.name


def _record(command, in_place, **facts):
    folder = _folder(command, in_place)
    folder.mkdir(parents=True, exist_ok=True)
    build.write_record(folder, version=version, **facts)


def _give_up(command, in_place, reason):
    if build.environment_flag("SELFSUP_KERNELS_REQUIRE_EXTENSION"):
        raise SystemExit(f"selfsup_kernels: {reason}")
    print(f"selfsup_kernels: pure-Python install: {reason}", file=sys.stderr)
    _record(command, in_place, failure=reason)
    build_cuda.discard(_folder(command, in_place))


def _pure_python(reason):
    class BuildPy(build_py):
        def run(self):
            super().run()
            _give_up(self, self.editable_mode, reason)

    return {"cmdclass": {"build_py": BuildPy}}


def _cuda(folder, force=False):
    """Build the CUDA library into ``folder``. Returns what the record says of it, or why it was not built."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    build_cuda.discard(folder)
    for name in ("SELFSUP_KERNELS_SKIP_CUDA_BUILD", "SELFSUP_KERNELS_SANITIZE"):
        if build.environment_flag(name):
            return {"cuda_failure": f"{name} was set."}
    force = force or build.environment_flag("FORCE_CUDA")
    kit = None
    try:
        kit = build_cuda.prepare(torch.__version__, torch.version.cuda, force)
        defines = [f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET_VERSION}"]
        facts = build_cuda.build(kit, folder, include_paths(), library_paths(), build.LIBRARIES, defines)
    except build_cuda.Unavailable as reason:
        # What was asked for, or was begun where no build may fail.
        if force or (kit is not None and build.environment_flag("SELFSUP_KERNELS_REQUIRE_EXTENSION")):
            raise SystemExit(f"selfsup_kernels: no CUDA library: {reason}") from None
        if kit is not None or torch.version.cuda is not None:
            print(f"selfsup_kernels: no CUDA library: {reason}", file=sys.stderr)
        return {"cuda_failure": str(reason)}
    size = (folder / build_cuda.LIBRARY).stat().st_size / 2**20
    print(f"{folder / build_cuda.LIBRARY}: {size:.1f} MB for {facts['cuda_architectures']}, by CUDA {kit.name}")
    return facts


class BuildCuda(Command):
    description = "build the CUDA library alone, in the source tree"
    user_options = []  # noqa: RUF012

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        import torch

        facts = {k: v for k, v in build.record().items() if not k.startswith("cuda_")}
        facts = {"version": version, "torch": torch.__version__, "torch_target": build.TORCH_TARGET_VERSION} | facts
        build.write_record(PACKAGE, **facts | _cuda(PACKAGE, force=True))


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
            facts = {
                "torch": torch.__version__,
                "torch_target": build.TORCH_TARGET_VERSION,
                "flags": " ".join(build.COMPILE_FLAGS),
                "sanitized": sanitize,
            }
            # Twice: the CUDA library may fail the build, and the extension is here and needs its record.
            _record(self, in_place, **facts, cuda_failure="its build failed.")
            _record(self, in_place, **facts | _cuda(_folder(self, in_place)))

    # First, since the headers of torch 2.11 have a pybind11 that refuses the stable ABI.
    include_dirs = [pybind11.get_include(), *include_paths()]
    extension = build.extension(Extension, include_dirs, library_paths(), sanitize=sanitize)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "build_cuda": BuildCuda}}


class WithoutMetadata(Distribution):
    """Of a setuptools that refuses the license of pyproject.toml, which names it as since 77: in place nothing of that
    file is needed."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        super().parse_config_files([], ignore_option_errors)


in_place = "--inplace" in sys.argv or "build_cuda" in sys.argv
metadata = {"distclass": WithoutMetadata} if in_place and int(setuptools.__version__.split(".")[0]) < 77 else {}
setup(version=version, **_extension(), **metadata)
