"""The build of the CUDA library: finding the toolkit, the architectures, the commands.

``setup.py`` and ``python -m selfsup_kernels info`` use it; it imports neither torch nor the package. It does not use
``torch.utils.cpp_extension``, which finds no toolkit if torch is CPU-only, refuses a toolkit of another minor version,
and raises an IndexError if neither a GPU nor a list gives the architectures. ``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS``
have the same meaning as there.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "_CUDA.so"
"""The file name. ``torch.ops.load_library`` loads it; it is not a Python module. See ``build.cuda_library``."""

MIN_TOOLKIT = (12, 6)
"""The oldest CUDA version that there are builds of PyTorch 2.11 and later for. Blackwell needs 12.8."""

DEFAULT_ARCHITECTURES = ("8.0+PTX", "9.0a", "10.0", "12.0")
"""8.0 also runs on 8.6, 8.7 and 8.9, 10.0 on 10.3, and 12.0 on 12.1. The PTX is that of 8.0, because it runs on every
GPU without machine code here (11.0, future GPUs, Blackwell if the toolkit does not know it)."""
NAMED = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}

# No fast-math: NaN and Inf must propagate. Profilers, compute-sanitizer and the listings use the line numbers. The code
# of several architectures is large, and compresses well.
COMPILE_FLAGS = (
    "-O3",
    "-std=c++20",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
# The CUDA runtime is linked in statically, with hidden symbols, so that one library works with torch builds of several
# CUDA versions. No symbol comes from `libtorch` itself, so without --no-as-needed the linker would drop it, and
# libtorch_cuda would not be found through it.
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-Xlinker=--exclude-libs,ALL")


class Unavailable(Exception):
    """The library cannot be built: one line that says why, and what to do about it."""


class Toolkit(NamedTuple):
    nvcc: Path
    version: tuple[int, int]
    architectures: frozenset[int]
    """The architectures that it can compile for: 80, 90, ..."""

    @property
    def name(self):
        return "{}.{}".format(*self.version)


WANTED = f"the CUDA toolkit, {'.'.join(map(str, MIN_TOOLKIT))} or later (12.8 for Blackwell)"
_INSTALL = f"Install {WANTED}, and set CUDA_HOME to its folder"


def find_nvcc() -> Path:
    """Return the nvcc of CUDA_HOME or CUDA_PATH if one is set, else of PATH, else of /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise Unavailable(f"{name} is {home}, but there is no {nvcc}. {_INSTALL}.")
            return nvcc
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise Unavailable(f"no nvcc was found on PATH or in /usr/local/cuda. {_INSTALL}.")
    return Path(found).resolve()


def toolkit() -> Toolkit:
    nvcc = find_nvcc()

    def ask(argument):
        try:
            return subprocess.run([nvcc, argument], capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"{nvcc} {argument} fails ({error}). {_INSTALL}.") from None

    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    if release is None:
        raise Unavailable(f"{nvcc} --version names no release. {_INSTALL}.")
    version = int(release[1]), int(release[2])
    if version < MIN_TOOLKIT:
        raise Unavailable(f"{nvcc} is of CUDA {release[1]}.{release[2]}, which is too old. {_INSTALL}.")
    codes = re.findall(r"sm_(\d+)", ask("--list-gpu-code"))
    return Toolkit(nvcc, version, frozenset(map(int, codes)))


def asked_for(listed: str | None = None) -> tuple[str, ...]:
    """Return the architectures of TORCH_CUDA_ARCH_LIST; none if it leaves them to the build."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if listed is None else listed
    for name, meaning in NAMED.items():
        listed = re.sub(rf"\b{name}\b(\+PTX)?", meaning, listed)
    asked = tuple(dict.fromkeys(listed.replace(",", ";").replace(" ", ";").strip(";").split(";")))
    return () if asked in (("",), ("native",)) else asked


def architectures(kit: Toolkit, listed: str | None = None) -> tuple[str, ...]:
    """Return the architectures of TORCH_CUDA_ARCH_LIST, unchanged; else the default ones that the toolkit knows."""
    asked = asked_for(listed)
    if not asked:
        return tuple(a for a in DEFAULT_ARCHITECTURES if _number(a) in kit.architectures)
    for a in filter(None, asked):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a):
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {a!r}; expected something like 8.0;9.0a;12.0+PTX.")
        if _number(a) < 80:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {a}; the kernels need 8.0 (Ampere) or later.")
        if _number(a) not in kit.architectures:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {a}, which {kit.nvcc} (CUDA {kit.name}) does not know.")
    return tuple(filter(None, asked))


def _number(architecture):
    return int(re.sub(r"[af]?(\+PTX)?$", "", architecture).replace(".", ""))


def target_flags(architectures) -> list[str]:
    flags = []
    for a in architectures:
        name = a.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if a.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def sources() -> list[Path]:
    # Backwards: optim.cu takes longest, and must not begin when the others are done.
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"), reverse=True)


def prepare(torch_version: str, torch_cuda: str | None, force: bool) -> Toolkit:
    """Return the toolkit to build with for this torch. Raises :class:`Unavailable`."""
    if not sources():
        raise Unavailable("there are no CUDA sources in csrc/cuda.")
    if torch_cuda is None and not force:
        raise Unavailable(
            f"this PyTorch ({torch_version}) was built without CUDA. Install a CUDA build of it; FORCE_CUDA=1 builds"
            " the library anyway."
        )
    kit = toolkit()
    if not force and kit.version[0] != int(torch_cuda.split(".")[0]):
        raise Unavailable(
            f"{kit.nvcc} is of CUDA {kit.name}, PyTorch {torch_version} of CUDA {torch_cuda}. Set CUDA_HOME to a"
            f" toolkit of CUDA {torch_cuda.split('.')[0]}; FORCE_CUDA=1 builds with this one anyway."
        )
    return kit


def build(kit: Toolkit, folder: Path, include_dirs, library_dirs, libraries, defines) -> dict[str, str]:
    """Compile and link ``folder/_CUDA.so``. Return its entries for the record. Raises :class:`Unavailable`."""
    listed = architectures(kit)
    objects = ROOT / "build" / "cuda"
    objects.mkdir(parents=True, exist_ok=True)
    jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    threads = max(1, min(len(listed), jobs // len(sources())))  # per file, if there are more jobs than files
    flags = [*COMPILE_FLAGS, *defines, *target_flags(listed), f"--threads={threads}"]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem={p}" for p in include_dirs)]
    flags += [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
    link = [*LINK_FLAGS, *target_flags(listed), *(f"-L{p}" for p in library_dirs), *(f"-l{name}" for name in libraries)]
    try:
        _compile(kit.nvcc, flags, link, objects, jobs)
    except (OSError, subprocess.CalledProcessError) as error:
        status = getattr(error, "returncode", error)
        raise Unavailable(f"nvcc failed ({status}); see its output above.") from None
    folder.mkdir(parents=True, exist_ok=True)
    # Replaced in one step: a process that has the old library open keeps it.
    shutil.copy(objects / LIBRARY, folder / f"{LIBRARY}.new")
    os.replace(folder / f"{LIBRARY}.new", folder / LIBRARY)
    return {
        "cuda_architectures": " ".join(listed),
        "cuda_toolkit": kit.name,
        "cuda_flags": " ".join((*COMPILE_FLAGS, *defines)),
    }


def _compile(nvcc, flags, link, folder, jobs):
    """Compile what changed with ninja, or everything if there is no ninja."""
    library = folder / LIBRARY
    named = {folder / f"{s.stem}.o": s for s in sources()}
    ninja = _ninja()
    if ninja is None:

        def compile_one(item):
            subprocess.run([nvcc, *flags, "-c", item[1], "-o", item[0]], check=True, stdout=sys.stderr)

        with ThreadPoolExecutor(min(jobs, len(named))) as pool:
            list(pool.map(compile_one, named.items()))
        subprocess.run([nvcc, *named, *link, "-o", library], check=True, stdout=sys.stderr)
        return

    def escaped(words):
        return " ".join(str(w).replace("$", "$$").replace(" ", "$ ") for w in words)

    rules = [
        f"nvcc = {escaped([nvcc])}",
        f"flags = {escaped(flags)}",
        "rule compile\n  command = $nvcc $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $nvcc $in {escaped(link)} -o $out",
        *(f"build {escaped([o])}: compile {escaped([s])}" for o, s in named.items()),
        f"build {escaped([library])}: link {escaped(named)}",
        "",
    ]
    (folder / "build.ninja").write_text("\n".join(rules))
    subprocess.run([ninja, "-C", folder, f"-j{jobs}"], check=True, stdout=sys.stderr)


def _ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def discard(folder: Path) -> None:
    """Delete the library of an earlier build, which would be mistaken for this build's."""
    (folder / LIBRARY).unlink(missing_ok=True)
