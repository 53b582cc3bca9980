"""The description of the C++ extension: sources, flags, and the record of how it was built.

``setup.py``, the loader (``backends``), ``python -m selfsup_kernels info`` and the sanitizer build read it. Importing
it needs neither torch nor a compiler.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import urllib.parse
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = PACKAGE / "_build_info.json"
"""The facts of the last build, or why it failed. Written by ``setup.py``."""

MIN_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
"""The oldest torch version whose stable ABI the extension uses: one library loads in that version and later ones."""

PREPARE = "pip install 'torch>=2.11' pybind11 ninja 'setuptools>=77' wheel"
INSTALL = "pip install --no-build-isolation ."
"""The commands that install the build's requirements and build; run from a checkout."""

SOURCES = (
    "csrc/cpu/module.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_default.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/info_nce.cpp",
    "csrc/cpu/info_nce_labels.cpp",
    "csrc/cpu/info_nce_layout.cpp",
    "csrc/cpu/siglip.cpp",
    "csrc/cpu/byol.cpp",
    "csrc/cpu/ema.cpp",
    "csrc/cpu/optim.cpp",
    "csrc/launch/driver.cpp",
    "csrc/launch/tape.cpp",
    "csrc/launch/ops.cpp",
)
HEADERS = ("csrc/common", "csrc/cpu", "csrc/launch")

# No -march=native: the kernels choose their instruction set at run time. No -ffast-math: NaN and Inf must propagate.
# Contraction to fused multiply-adds is explicit, because -std=c++20 turns it off.
COMPILE_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
# The library links to libtorch, so that symbols resolve however the library is loaded.
LIBRARIES = ("torch", "torch_cpu", "c10")
# A report names lines, which is all of -g that it needs; the rest takes a third of the time of a build.
SANITIZER_FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)


GENERATED = PACKAGE.parent / "build" / "include"
"""The folder of the headers that are generated from Python."""


def write_headers() -> Path:
    """Print the records of calls and the numbers of the objectives as C++; return the include folder."""
    path, text = GENERATED / "generated" / "call.h", call_header()
    if not path.exists() or path.read_text() != text:  # else everything would be compiled again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return GENERATED


def interface() -> str:
    """Return a digest of what the library and the package must agree on."""
    return hashlib.sha256(call_header().encode()).hexdigest()[:16]


def call_header() -> str:
    """Return the text of ``generated/call.h``."""
    record, objectives, call, siglip = _load("core.record", "info_nce.objectives", "info_nce.call", "siglip.call")
    lines = [
        "// Printed by selfsup_kernels/core/build.py from info_nce/call.py, info_nce/objectives.py and siglip/call.py.",
        "#pragma once",
        "#include <torch/csrc/stable/library.h>",
        "#include <cstdint>",
        "namespace selfsup_kernels {",
    ]
    for kind in (objectives.Columns, objectives.Positives, objectives.Numerator, objectives.Ids):
        lines.append(f"enum class {kind.__name__} : int64_t {{ {', '.join(f'{x.name} = {x.value}' for x in kind)} }};")
    lines += record.struct("Call", call.Call) + record.struct("SiglipCall", siglip.Call)
    lines += [
        f"constexpr int saved_fields = {len(call.Saved._fields)};  // {' '.join(call.Saved._fields)}",
        "}  // namespace selfsup_kernels",
        "",
    ]
    return "\n".join(lines)


def _load(*names):
    """Load modules of the package without importing the package. Each imports only the standard library and modules
    that are named before it."""
    paths = {f"{PACKAGE.name}.{name}": PACKAGE.joinpath(*name.split(".")).with_suffix(".py") for name in names}
    before = {name: sys.modules.pop(name, None) for name in paths}
    try:
        for name, path in paths.items():
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)  # Enum and NamedTuple look up their module here
            spec.loader.exec_module(sys.modules[name])
        return [sys.modules[name] for name in paths]
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def extension(setuptools_extension, include_dirs, library_dirs, sanitize=False):
    """Return the ``Extension`` for setuptools."""
    extra = SANITIZER_FLAGS if sanitize else ()
    return setuptools_extension(
        "selfsup_kernels._C",
        sources=list(SOURCES),
        include_dirs=[str(PACKAGE.parent / "csrc"), str(write_headers()), *include_dirs],
        library_dirs=list(library_dirs),
        libraries=list(LIBRARIES),
        extra_compile_args=[*COMPILE_FLAGS, *extra],
        extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
        language="c++",
        depends=[str(h) for folder in HEADERS for h in sorted(Path(folder).glob("*.h"))],
    )


def write_record(folder, **facts) -> None:
    """Write the record, with this machine's facts, to the library's ``folder``."""
    (Path(folder) / RECORD.name).write_text(
        json.dumps({"interface": interface()} | facts | machine(), indent=2, sort_keys=True) + "\n"
    )


def record() -> dict:
    """Return what ``setup.py`` wrote; empty if nothing was built from this tree."""
    try:
        return json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}


SOURCE = PACKAGE.parent if (PACKAGE.parent / "setup.py").is_file() else None
"""The source folder if the package is imported from it, as in a checkout; None if the package is installed."""


def not_built() -> str:
    """Return why the package's folder holds no extension."""
    if "failure" in record():
        return f"the C++ extension was not built: {record()['failure']}"
    if SOURCE is None:
        return f"the C++ extension is not in {PACKAGE}."
    installed = _installed_elsewhere()
    if installed is None:
        return f"the C++ extension was not built in the source folder {SOURCE}, from where the package is imported."
    return (
        f"the package is imported from its source folder {SOURCE}, where the C++ extension was not built. The one"
        f" installed in {installed} has it: start Python in another folder to use that one, or build here."
    )


def _installed_elsewhere() -> Path | None:
    """Return the folder of another copy of the package on ``sys.path`` that has an extension."""
    for entry in sys.path:
        folder = Path(entry).resolve() / PACKAGE.name
        if folder != PACKAGE and next(folder.glob("_C.*"), None):
            return folder
    return None


def rebuild() -> str:
    """Return the command that rebuilds the package in the place it is imported from."""
    own = "SELFSUP_KERNELS_SKIP_BUILD=0 " if environment_flag("SELFSUP_KERNELS_SKIP_BUILD") else ""
    if SOURCE is not None:
        return f"{own}pip install -e {shlex.quote(str(SOURCE))}"
    return f"{own}pip install --force-reinstall --no-deps {shlex.quote(_installed_from())}"


def _installed_from() -> str:
    """Return the folder that pip installed the package from (PEP 610); "." if it is unknown or gone."""
    try:
        url = json.loads(importlib.metadata.distribution("selfsup-kernels").read_text("direct_url.json") or "{}")["url"]
        folder = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    except (importlib.metadata.PackageNotFoundError, KeyError, ValueError):
        return "."
    return str(folder) if url.startswith("file:") and (folder / "setup.py").is_file() else "."


def machine() -> dict:
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def built_for() -> str:
    """Return a sentence: built for X, you have Y."""
    import torch

    facts = record()
    built = f"torch {facts.get('torch', '?')}, Python {facts.get('python', '?')}, {facts.get('platform', '?')}"
    have = machine()
    return f"Built for {built}; you have torch {torch.__version__}, Python {have['python']}, {have['platform']}."


def too_old(torch_version: str) -> bool:
    return tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2]) < MIN_TORCH


def mismatch() -> str | None:
    """Return why the built library must not be loaded here, or None."""
    import torch

    from selfsup_kernels.version import __version__

    facts = record()
    if not facts or "failure" in facts:
        return not_built() if facts else "the C++ extension has no build record."
    if too_old(torch.__version__):
        return f"torch {'.'.join(map(str, MIN_TORCH))} or later is needed. {built_for()}"
    if facts.get("version") != __version__:
        return f"the C++ extension is of version {facts.get('version')}, the package of {__version__}."
    if facts.get("interface") != interface():
        return "the C++ extension was built from other sources than the package has."
    if facts.get("platform") != machine()["platform"]:
        return built_for()
    return None


def cuda_library() -> tuple[Path | None, str | None]:
    """Return (path of the CUDA library, None) or (None, why there is none)."""
    found = [p for pattern in ("_CUDA*.so", "_CUDA*.pyd") for p in sorted(PACKAGE.glob(pattern))]
    if found:
        return found[0], None
    return None, f"the CUDA library was not built: {record().get('cuda_failure') or not_built()}"


_PACKAGES = {
    "apt-get": ("apt-get install -y", "g++", "python3-dev"),
    "dnf": ("dnf install -y", "gcc-c++", "python3-devel"),
    "apk": ("apk add", "g++", "python3-dev"),
}
"""For each package manager: its command and its packages of a C++ compiler and of Python's headers."""
COMPILERS = (*(f"g++-{n}" for n in range(16, 10, -1)), *(f"clang++-{n}" for n in range(22, 13, -1)), "clang++", "g++")
"""Those that compile C++20, by the names of distributions; the last two may be older."""


def compiler() -> str | None:
    """Return the path of the C++ compiler that a build would use; None if it is not found."""
    return shutil.which((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0])


def cannot_compile() -> tuple[str, str] | None:
    """Return (what is missing, a prefix for the build command that provides it), or None."""
    without_compiler = compiler() is None
    if without_compiler:
        wanted = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        why = f"no C++ compiler: {wanted} is not on PATH."
        others = [name for name in ("g++", "clang++", "c++") if shutil.which(name)]
        if others:
            return why, f"CXX={others[0]} "
    elif not (headers := Path(sysconfig.get_path("include")) / "Python.h").is_file():
        why = f"Python's headers are missing: there is no {headers}."
    else:
        return None
    if shutil.which("xcode-select"):
        return why, "xcode-select --install && "
    _, package, headers = _PACKAGES[_manager() or "apt-get"]
    first = _install(package if without_compiler else headers)
    return why, first or f"install {'g++ or clang++' if without_compiler else 'them'}, then "


def another_compiler() -> str:
    """Return a prefix for the build command, for a compiler other than the one that failed: one that is here, or one of
    the other kind to install."""
    failed = Path(compiler() or "").resolve()
    for name in COMPILERS:
        found = shutil.which(name)
        if found and Path(found).resolve() != failed:
            return f"CXX={name} "
    if "clang" in failed.name:
        return f"{_install(_PACKAGES[_manager() or 'apt-get'][1]) or 'install GCC 11 or later, then '}CXX=g++ "
    return f"{_install('clang') or 'install Clang 14 or later, then '}CXX=clang++ "


def _manager() -> str | None:
    return next(filter(shutil.which, _PACKAGES), None)


def _install(package) -> str | None:
    """Return a prefix that installs a package; None without a known package manager."""
    manager = _manager()
    if manager is None:
        return None
    sudo = "sudo " if os.geteuid() and shutil.which("sudo") else ""
    update = f"{sudo}apt-get update && " if manager == "apt-get" else ""
    return f"{update}{sudo}{_PACKAGES[manager][0]} {package} && "


def environment_flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")
