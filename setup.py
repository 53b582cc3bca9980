"""Build the C++ extension, and the CUDA library if torch is a CUDA build and there is a CUDA toolkit of the same major
version. Compile the Triton kernels ahead of time for the GPUs of this machine, or of TORCH_CUDA_ARCH_LIST. A build that
cannot compile fails with an error that says what to type.

SELFSUP_KERNELS_SKIP_BUILD=1 gives a pure-Python package, SELFSUP_KERNELS_SKIP_CUDA_BUILD=1 leaves out the CUDA
library, SELFSUP_KERNELS_SKIP_AHEAD=1 the Triton kernels, which first calls then compile. SELFSUP_KERNELS_AHEAD selects
some of them (options of ``selfsup_kernels.lab.ahead``). FORCE_CUDA=1 builds the CUDA library with any torch, or fails.
TORCH_CUDA_ARCH_LIST selects the GPUs, MAX_JOBS the number of parallel compilers. SELFSUP_KERNELS_SANITIZE=1 builds
the extension with AddressSanitizer and UBSan. ``python setup.py build_cuda`` builds only the CUDA library, in
place.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import site
import subprocess
import sys
import threading
from pathlib import Path

import setuptools
from setuptools import Command, Distribution, Extension, setup
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).resolve().parent / "selfsup_kernels"


def _module(name):
    """Load a module of the package without importing the package, which would need torch."""
    spec = importlib.util.spec_from_file_location(Path(name).name, PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _module("core/build")
build_cuda = _module("core/build_cuda")
version = _module("version").__version__


def _folder(command, in_place):
    """Return the folder for libraries and the record: the source tree, or the wheel's contents."""
    return PACKAGE if in_place else Path(command.build_lib) / PACKAGE.name


def _record(command, in_place, **facts):
    folder = _folder(command, in_place)
    folder.mkdir(parents=True, exist_ok=True)
    build.write_record(folder, version=version, **facts)


def _fail(reason, command):
    """Exit with the reason as the last lines: pip shows a build's output only if it fails, and users read its end."""
    raise SystemExit(f"selfsup_kernels: {reason}\nType: {command}")


def _pure_python():
    class BuildPy(build_py):
        def run(self):
            super().run()
            _record(self, self.editable_mode, failure="SELFSUP_KERNELS_SKIP_BUILD was set at the install.")
            build_cuda.discard(_folder(self, self.editable_mode))

    return {"cmdclass": {"build_py": BuildPy}}


def _import_torch():
    """Return torch and the command that runs this build.

    An isolated build hides the environment's packages. torch is imported from the environment anyway: a copy for the
    build would be gigabytes, and its version might not be able to load the extension.
    """
    command = build.INSTALL
    try:
        import torch
    except ImportError:
        command = "pip install ."
        sys.path.extend([*site.getsitepackages(), site.getusersitepackages()])
        try:
            import torch
        except ImportError as error:
            _fail(f"the build needs torch, and could not import it ({error}).", f"{build.PREPARE} && {build.INSTALL}")
    if build.too_old(torch.__version__):
        _fail(f"the build needs torch 2.11 or later, and found {torch.__version__}.", f"{build.PREPARE} && {command}")
    return torch, command


@contextlib.contextmanager
def _copied_output():
    """Collect in a list the lines that this process and its children print, and print them too."""
    read, write = os.pipe()
    printed, lines = (os.dup(1), os.dup(2)), []

    def copy():
        with open(read, "rb") as stream:
            for line in stream:
                os.write(printed[0], line)
                lines.append(line.decode(errors="replace").rstrip())

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, original in enumerate(printed, start=1):
            os.dup2(original, fd)
        reader.join(10)  # a compiler's server that outlives the build may hold the pipe open


def _errors(lines):
    """Return the first compiler errors of a build's output, or its last lines if there are none."""
    found = [line for line in lines if re.search(r"\berror: |\bKilled\b|: not found|cannot find ", line)]
    return [line[:300] for line in found[:3] or lines[-3:]]


def _cuda(folder, force=False):
    """Build the CUDA library into ``folder``. Return its entries for the record, or why it was not built."""
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
        if force:
            raise SystemExit(f"selfsup_kernels: no CUDA library: {reason}") from None
        if kit is not None:
            _fail(f"no CUDA library: {reason}", f"SELFSUP_KERNELS_SKIP_CUDA_BUILD=1 {build.INSTALL}   # leaves it out")
        if torch.version.cuda is not None:
            print(f"selfsup_kernels: no CUDA library: {reason}", file=sys.stderr)
        return {"cuda_failure": str(reason)}
    size = (folder / build_cuda.LIBRARY).stat().st_size / 2**20
    print(f"{folder / build_cuda.LIBRARY}: {size:.1f} MB for {facts['cuda_architectures']}, by CUDA {kit.name}")
    return facts


def _kernels(folder):
    """Compile the Triton kernels of the package in ``folder`` ahead of time. A failure fails no build: users' first
    calls then compile them. Return entries for the record."""
    skipped = map(build.environment_flag, ("SELFSUP_KERNELS_SKIP_AHEAD", "SELFSUP_KERNELS_SANITIZE"))
    if any(skipped) or importlib.util.find_spec("triton") is None:
        return {}
    import torch

    numbers = [re.match(r"(\d+)\.(\d)", name) for name in build_cuda.asked_for()]
    architectures = {f"{n[1]}{n[2]}" for n in numbers if n}
    if not architectures and torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        architectures = {f"{major}{minor}" for major, minor in capabilities}
    if not architectures:
        return {}
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    command = [sys.executable, "-m", "selfsup_kernels.lab.ahead", "--jobs", jobs, "--arch", *sorted(architectures)]
    command += shlex.split(os.environ.get("SELFSUP_KERNELS_AHEAD", ""))
    paths = os.pathsep.join([str(folder.parent.resolve()), *filter(None, sys.path)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, cwd=folder.parent)
    return {} if done.returncode == 0 else {"ahead_failure": f"compiling for {' '.join(architectures)} failed."}


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
        return _pure_python()
    torch, command = _import_torch()
    try:
        import pybind11
    except ImportError:
        _fail("the build needs pybind11, and could not import it.", f"{build.PREPARE} && {command}")
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    sanitize = build.environment_flag("SELFSUP_KERNELS_SANITIZE")

    class Build(BuildExtension):
        """A build that ends with the reason if it fails, and records its facts if it succeeds."""

        def run(self):
            if (lacking := build.cannot_compile()) is not None:
                why, first = lacking
                _fail(why, f"{first}{command}")
            in_place = bool(self.inplace or self.editable_mode)
            try:
                with _copied_output() as lines:
                    super().run()
            except (Exception, SystemExit) as error:
                said = "".join(f"\n  {line}" for line in _errors(lines) or [f"{type(error).__name__}: {error}"])
                killed = "Killed" in said  # for lack of memory
                again = "MAX_JOBS=1 " if killed else build.another_compiler()
                needs = "" if killed else " (GCC 11, Clang 14 or later is needed)"
                without = f"or, for a slower package without kernels: SELFSUP_KERNELS_SKIP_BUILD=1 {command}"
                _fail(
                    f"the C++ compiler {build.compiler()} failed{needs}:{said}",
                    f"{again}{command}\n  {without}",
                )
            facts = {
                "torch": torch.__version__,
                "torch_target": build.TORCH_TARGET_VERSION,
                "flags": " ".join(build.COMPILE_FLAGS),
                "sanitized": sanitize,
            }
            # Written twice: if the CUDA library fails the build, the extension still needs its record.
            _record(self, in_place, **facts, cuda_failure="its build failed.")
            folder = _folder(self, in_place)
            facts |= _cuda(folder)
            _record(self, in_place, **facts)
            _record(self, in_place, **facts | _kernels(folder))

    # pybind11 comes first, since the copy in torch 2.11's headers refuses the stable ABI.
    include_dirs = [pybind11.get_include(), *include_paths()]
    extension = build.extension(Extension, include_dirs, library_paths(), sanitize=sanitize)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "build_cuda": BuildCuda}}


class WithoutMetadata(Distribution):
    """Ignores pyproject.toml: setuptools < 77 rejects its SPDX `license` field, and in-place builds do not need it."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        super().parse_config_files([], ignore_option_errors)


in_place = "--inplace" in sys.argv or "build_cuda" in sys.argv
old = int(setuptools.__version__.split(".")[0]) < 77
if old and not in_place:
    _fail(
        f"the build needs setuptools 77 or later, and found {setuptools.__version__}.",
        f"{build.PREPARE} && {build.INSTALL}",
    )
setup(version=version, **_extension(), **({"distclass": WithoutMetadata} if old else {}))
