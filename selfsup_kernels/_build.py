"""The one description of the C++ extension: sources, flags, and the record of how it was built.

Read by ``setup.py``, by the loader (``backends``), by ``python -m selfsup_kernels info`` and by the sanitizer build.
Importing it needs neither torch nor a compiler.
"""

import json
import os
import platform
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECORD = PACKAGE / "_build_info.json"
"""What the last build was made of, or why it failed. Written by ``setup.py``."""

MIN_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
"""The oldest torch whose stable ABI the extension uses: one library serves that version and later ones."""

SOURCES = (
    "csrc/cpu/module.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_default.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/info_nce.cpp",
    "csrc/cpu/info_nce_labels.cpp",
    "csrc/cpu/info_nce_layout.cpp",
    "csrc/cpu/byol.cpp",
    "csrc/cpu/ema.cpp",
    "csrc/cpu/optim.cpp",
)
HEADERS = ("csrc/common", "csrc/cpu")

# No -march=native and no -ffast-math: the vector kernels choose their instruction set at run time, and NaN and Inf
# must come through. Contraction into fused multiply-adds is asked for explicitly, -std=c++20 switches it off.
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
# The library names libtorch among its needs, so that its symbols are found however it is loaded.
LIBRARIES = ("torch", "torch_cpu", "c10")
SANITIZER_FLAGS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)


def extension(setuptools_extension, include_dirs, library_dirs, sanitize=False):
    """The ``Extension`` for setuptools."""
    extra = SANITIZER_FLAGS if sanitize else ()
    return setuptools_extension(
        "selfsup_kernels._C",
        sources=list(SOURCES),
        include_dirs=[str(PACKAGE.parent / "csrc"), *include_dirs],
        library_dirs=list(library_dirs),
        libraries=list(LIBRARIES),
        extra_compile_args=[*COMPILE_FLAGS, *extra],
        extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
        language="c++",
        depends=[str(h) for folder in HEADERS for h in sorted(Path(folder).glob("*.h"))],
    )


def write_record(folder, **facts) -> None:
    """Write the record, with this machine's facts, into ``folder``, where the library lies."""
    (Path(folder) / RECORD.name).write_text(json.dumps(facts | machine(), indent=2, sort_keys=True) + "\n")


def record() -> dict:
    """What ``setup.py`` wrote; empty where nothing was built from this tree."""
    try:
        return json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}


def recorded_failure() -> str:
    return record().get("failure") or "no build was attempted (the package is used from its source folder)."


def machine() -> dict:
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def built_for() -> str:
    """One sentence: built for X, you have Y."""
    import torch

    facts = record()
    built = f"torch {facts.get('torch', '?')}, Python {facts.get('python', '?')}, {facts.get('platform', '?')}"
    have = machine()
    return f"Built for {built}; you have torch {torch.__version__}, Python {have['python']}, {have['platform']}."


def mismatch() -> str | None:
    """Why the built library must not be loaded here, or None."""
    import torch

    from selfsup_kernels.version import __version__

    facts = record()
    if not facts or "failure" in facts:
        return f"the C++ extension has no build record: {recorded_failure()}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        return f"torch {'.'.join(map(str, MIN_TORCH))} or later is needed. {built_for()}"
    if facts.get("version") != __version__:
        return f"the C++ extension is of version {facts.get('version')}, the package of {__version__}."
    if facts.get("platform") != machine()["platform"]:
        return built_for()
    return None


def cuda_library() -> tuple[Path | None, str | None]:
    """(the CUDA library that was built, None) or (None, why there is none)."""
    found = [p for pattern in ("_CUDA*.so", "_CUDA*.pyd") for p in sorted(PACKAGE.glob(pattern))]
    if found:
        return found[0], None
    return None, f"the CUDA library was not built: {record().get('cuda_failure', recorded_failure())}"


def environment_flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")
