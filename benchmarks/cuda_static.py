"""Reads the machine code of the built CUDA library, without a GPU; fails where it is not right.

    python benchmarks/cuda_static.py [LIBRARY] [--contents] [--json FILE]

The exit status is 1 where a kernel has a stack frame, keeps registers in local memory, has more registers than its
launch bounds leave it, moves memory in less than 128 bits at a time (EMA and BYOL, on aligned rows), or multiplies
matrices without the matrix instructions (InfoNCE). ``--contents`` only says what is in the library: also whether it
registers every op, for which it is loaded in a process of its own, in any build of torch.

Compiled, not run: nothing here says that a kernel is right or fast.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "selfsup_kernels" / "_CUDA.so"

HEADING = re.compile(r"^\s*Function\s*:?\s+(\S+?):?\s*$")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
BOUND = re.compile(r"^\.(entry|maxntid|minnctapersm)\s+([^,(\s]+)", re.M)

VECTORS = ("ema_kernel", "byol_forward_kernel", "byol_backward_kernel")
SCALAR = re.compile(r"byol_\w+_kernelI(?:f|N3c10\w+E)Li1E")
"""The instances for rows that do not start at multiples of 16 bytes: their second argument, numbers at once, is 1."""
PRODUCTS = ("sums_kernel", "gradient_kernel")
REGISTERS = 65536


class Kernel(NamedTuple):
    """What the machine code of one kernel for one architecture says about it."""

    name: str
    symbol: str
    architecture: str
    registers: int
    stack: int
    local: int
    """Loads and stores of local memory."""
    wide: tuple[int, int]
    """Loads and stores of 128 bits."""
    matrix: int
    instructions: int
    bounds: tuple[int, int] | None
    """Threads of a block, and blocks that a multiprocessor shall hold at once."""


def tool() -> Path:
    """The cuobjdump of Triton's wheel, else that of the toolkit."""
    triton = importlib.util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"] if triton else []
    places += [Path(p) for p in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump") if p]
    for place in places:
        if place.exists():
            return place
    raise SystemExit("cuda_static: needs cuobjdump, of Triton's wheel (pip install triton) or of the CUDA toolkit")


def name_of(symbol: str) -> str:
    """The kernel's own name, which stands in the symbol behind its length; digits of a hash may come before that."""
    for end in (m.end() for m in re.finditer("_kernel", symbol)):
        for length in range(len("_kernel"), end):
            if symbol[: end - length].endswith(str(length)) and symbol[end - length].isalpha():
                return symbol[end - length : end]
    return symbol


def usage_of(text: str) -> dict[str, tuple[int, int, int]]:
    """symbol -> (registers, stack, local) from ``cuobjdump -res-usage``."""
    found, symbol = {}, None
    for line in text.splitlines():
        if heading := HEADING.match(line):
            symbol = heading[1]
        elif symbol and (usage := USAGE.search(line)):
            found[symbol] = tuple(map(int, usage.groups()))
    return found


def counts_of(lines) -> dict[str, Counter]:
    """symbol -> how often each instruction stands in it, from ``cuobjdump -sass``."""
    found, counts = {}, Counter()
    for line in lines:
        if heading := HEADING.match(line):
            counts = found.setdefault(heading[1], Counter())
        elif instruction := INSTRUCTION.match(line):
            counts[instruction[1]] += 1
    return found


def bounds_of(text: str) -> dict[str, tuple[int, int]]:
    """symbol -> launch bounds, from ``cuobjdump -ptx``: the machine code does not say them."""
    found, symbol = {}, None
    for word, value in BOUND.findall(text):
        if word == "entry":
            symbol = value
        else:
            threads, blocks = found.get(symbol, (0, 1))
            found[symbol] = (int(value), blocks) if word == "maxntid" else (threads, int(value))
    return found


def architectures(library: Path) -> list[str]:
    listed = _run("--list-elf", library)
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listed)), key=lambda a: int(re.sub(r"\D", "", a)))


def _run(*arguments) -> str:
    done = subprocess.run([tool(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cuda_static: cuobjdump {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def read(library: Path, architecture: str, bounds) -> list[Kernel]:
    usage = usage_of(_run("-res-usage", "-arch", architecture, library))
    with subprocess.Popen(
        [tool(), "-sass", "-arch", architecture, library], stdout=subprocess.PIPE, text=True
    ) as process:
        counted = counts_of(process.stdout)
    return [
        kernel(symbol, architecture, usage.get(symbol, (0, 0, 0)), counts, bounds.get(symbol))
        for symbol, counts in counted.items()
    ]


def kernel(symbol, architecture, usage, counts, bounds) -> Kernel:
    def count(pattern):
        return sum(n for name, n in counts.items() if re.match(pattern, name))

    wide = count(r"LDG\.E(\.\w+)*\.128"), count(r"STG\.E(\.\w+)*\.128")
    registers, stack, frame = usage
    matrix = count(r"HMMA|HGMMA|UTC\w*MMA")
    instructions = sum(counts.values())
    local = count(r"LDL|STL")
    return Kernel(
        name_of(symbol), symbol, architecture, registers, stack + frame, local, wide, matrix, instructions, bounds
    )


def problems(k: Kernel) -> list[str]:
    found = []
    if k.stack:
        found.append(f"stack frame of {k.stack} bytes")
    if k.local:
        found.append(f"{k.local} accesses to local memory")
    if k.bounds:
        threads, blocks = k.bounds
        if -(-k.registers // 8) * 8 * threads * blocks > REGISTERS:
            found.append(f"{k.registers} registers, with {blocks} blocks of {threads} threads")
    if k.name in VECTORS and not SCALAR.search(k.symbol):
        if not k.wide[0]:
            found.append("no 128-bit loads")
        if k.name != "byol_forward_kernel" and not k.wide[1]:
            found.append("no 128-bit stores")
    if k.name in PRODUCTS and not k.matrix:
        found.append("no matrix instructions")
    return found


def print_table(kernels: list[Kernel]) -> None:
    groups = defaultdict(list)
    for k in kernels:
        groups[k.name, k.architecture].append(k)

    def span(numbers):
        low, high = min(numbers), max(numbers)
        return str(low) if low == high else f"{low}-{high}"

    columns = "kernel", "arch", "variants", "registers", "stack", "LDL+STL", "LDG.128", "STG.128", "matrix", ""
    lines = [columns]
    for (name, architecture), of in sorted(groups.items()):
        failed = sum(bool(problems(k)) for k in of)
        cells = [name, architecture, str(len(of)), span([k.registers for k in of]), str(max(k.stack for k in of))]
        cells += [str(max(k.local for k in of))]
        cells += [span([k.wide[0] for k in of]), span([k.wide[1] for k in of]), span([k.matrix for k in of])]
        lines.append((*cells, f"FAILS: {failed}" if failed else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for k in kernels:
        if wrong := problems(k):
            print(f"FAILS: {k.architecture} {demangled(k.symbol)}: {'; '.join(wrong)}")


def demangled(symbol: str) -> str:
    if shutil.which("c++filt") is None:
        return symbol
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|selfsup_kernels::cuda::|c10::|^void ", "", text).split("(")[0]


def unregistered(library: Path) -> list[str]:
    """The ops that the library, once loaded, has no kernel for. Loads it into this process.

    A CPU-only torch lacks one function that the library calls to launch something. ``RTLD_LAZY`` does not look for
    functions before they are called; nothing is launched here.
    """
    sys.path.insert(0, str(ROOT))
    import selfsup_kernels  # noqa: F401

    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    if not dlopen(str(library).encode(), os.RTLD_LAZY):
        error = ctypes.CDLL(None).dlerror
        error.restype = ctypes.c_char_p
        raise SystemExit(f"cuda_static: {library} does not load: {error().decode()}")
    return without_kernel()


def without_kernel() -> list[str]:
    """The ops that CUDA tensors have no kernel for, neither of the library nor of Python's."""
    import torch

    from selfsup_kernels.core import ops

    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return [name for name in (*ops.SCHEMAS, *ops.CUDA_STAGES) if not has(f"{ops.NAMESPACE}::{name}.cuda", "CUDA")]


def print_contents(library: Path) -> int:
    size = library.stat().st_size / 2**20
    text = _run("--list-elf", library) + _run("--list-ptx", library)
    ptx = sorted(set(re.findall(r"\.(sm_\w+)\.ptx", text)))
    print(f"{library}: {size:.0f} MB, machine code for {', '.join(architectures(library))}, PTX for {', '.join(ptx)}")
    missing = unregistered(library)
    print(f"not registered: {', '.join(missing)}" if missing else "every op is registered")
    return 1 if missing else 0


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--contents", action="store_true", help="say what is in the library, and no more")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not options.library.exists():
        print(f"cuda_static: there is no {options.library}; run: make cuda")
        return 2
    if options.contents:
        return print_contents(options.library.resolve())
    bounds = bounds_of(_run("-ptx", options.library))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda a: read(options.library, a, bounds), architectures(options.library))
    kernels = [k for of in found for k in of]
    print_table(kernels)
    if options.json:
        options.json.write_text(json.dumps([k._asdict() | {"problems": problems(k)} for k in kernels], indent=1) + "\n")
    failed = [k for k in kernels if problems(k)]
    print(f"{len(kernels)} kernels; {len(failed)} fail" if kernels else "no kernels were found")
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
