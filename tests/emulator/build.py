"""Compile the CUDA sources for the emulator: ``python tests/emulator/build.py`` prints the path of the library.

``SELFSUP_KERNELS_SANITIZE=1`` adds AddressSanitizer and UBSan. Needs torch and a C++ compiler, no CUDA.
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def _description():
    """Load the package's build description without importing the package."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "selfsup_kernels" / "core" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    build = _description()
    sanitize = build.environment_flag("SELFSUP_KERNELS_SANITIZE")
    folder = ROOT / "build" / ("emulator-asan" if sanitize else "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=default",
        "-w",
        "-U_FORTIFY_SOURCE",  # the fortified longjmp refuses to jump to another stack
        "-g1",
        f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET_VERSION}",
    ]
    flags += build.SANITIZER_FLAGS if sanitize else ["-O2"]
    # The emulator's cuda/launch.h comes before the package's.
    flags += [f"-I{p}" for p in (HERE / "include", HERE, ROOT / "csrc", *include_paths())]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "emulator.cpp", HERE / "selftest.cu"]
    library = folder / "libselfsup_kernels_emulated.so"
    link = [f"-L{p}" for p in library_paths()] + [f"-l{name}" for name in build.LIBRARIES]
    link += ["-fsanitize=address,undefined"] if sanitize else []
    rules = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {' '.join(map(str, flags))}",
        "rule compile\n  command = $cxx $flags -MMD -MF $out.d -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared $in {' '.join(link)} -o $out",
        *(f"build {s.stem}.o: compile {s}" for s in sources),
        f"build {library}: link {' '.join(f'{s.stem}.o' for s in sources)}",
        "",
    ]
    text = "\n".join(rules)
    ninja_file = folder / "build.ninja"
    if not ninja_file.exists() or ninja_file.read_text() != text:
        ninja_file.write_text(text)
    import subprocess

    import ninja

    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True, stdout=sys.stderr)
    return library


if __name__ == "__main__":
    print(main())
