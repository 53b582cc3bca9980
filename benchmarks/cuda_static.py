"""Check the machine code of the built CUDA library, without a GPU; fails where it is not right.

    python benchmarks/cuda_static.py [LIBRARY] [--contents] [--json FILE]

The exit status is 1 where a kernel has a stack frame, keeps registers in local memory, has more registers than its
launch bounds leave it, or moves memory in less than 128 bits at a time (EMA and BYOL, on aligned rows). ``--contents``
only says what is in the library: also whether it registers every op, for which it is loaded in a process of its own,
in any build of torch.

Compiled, not run: nothing here says that a kernel is right or fast.
"""

import argparse
import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

from selfsup_kernels.lab import sass
from selfsup_kernels.lab.sass import counts_of, dump, usage_of

LIBRARY = Path(__file__).resolve().parents[1] / "selfsup_kernels" / "_CUDA.so"
BOUND = re.compile(r"^\.(entry|maxntid|minnctapersm)\s+([^,(\s]+)", re.M)
VECTORS = ("ema_kernel", "byol_forward_kernel", "byol_backward_kernel")
SCALAR = re.compile(r"byol_\w+_kernelI(?:f|N3c10\w+E)Li1E")
"""The instances for rows that do not start at multiples of 16 bytes: their second argument, numbers at once, is 1."""
REGISTERS = 65536


class Kernel(NamedTuple):
    """Describe the machine code of one kernel for one architecture."""

    name: str
    symbol: str
    architecture: str
    registers: int
    stack: int
    local: int
    """Loads and stores of local memory."""
    wide: tuple[int, int]
    """Loads and stores of 128 bits."""
    instructions: int
    bounds: tuple[int, int] | None
    """Threads of a block, and the blocks to be resident on a multiprocessor."""


def name_of(symbol: str) -> str:
    """Return the kernel's own name, which stands in the symbol behind its length."""
    found = re.search(r"(?<=\d)[a-z_]+_kernel(?![a-z])", symbol)
    return found[0] if found else symbol


def bounds_of(text: str) -> dict[str, tuple[int, int]]:
    """Return ``{symbol: launch bounds}`` from ``cuobjdump -ptx``: the machine code does not say them."""
    found, symbol = {}, None
    for word, value in BOUND.findall(text):
        if word == "entry":
            symbol = value
        else:
            threads, blocks = found.get(symbol, (0, 1))
            found[symbol] = (int(value), blocks) if word == "maxntid" else (threads, int(value))
    return found


def architectures(library: Path) -> list[str]:
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf", library))), key=lambda a: (len(a), a))


def kernel(symbol, architecture, usage, counts, bounds) -> Kernel:
    def count(pattern):
        return sum(n for name, n in counts.items() if re.match(pattern, name))

    wide = count(r"LDG\.E(\.\w+)*\.128"), count(r"STG\.E(\.\w+)*\.128")
    local, stack = count(r"LDL|STL"), usage.stack + usage.local
    found = (usage.registers, stack, local, wide, sum(counts.values()), bounds)
    return Kernel(name_of(symbol), symbol, architecture, *found)


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
    return found


def print_kernels(kernels: list[Kernel]) -> None:
    """Print a line for each kernel and architecture, with the most registers of its variants and so on."""
    groups = {}
    for k in kernels:
        groups.setdefault((k.name, k.architecture), []).append(k)
    lines = []
    for names, group in sorted(groups.items()):
        most = [max(getattr(k, field) for k in group) for field in ("registers", "stack", "local", "instructions")]
        failed = sum(bool(problems(k)) for k in group)
        lines.append([*names, str(len(group)), *map(str, most), f"FAILS: {failed}" if failed else ""])
    sass.print_table(("kernel", "arch", "variants", "registers", "stack", "LDL+STL", "instructions", ""), lines)
    for k in kernels:
        if wrong := problems(k):
            print(f"FAILS: {k.architecture} {k.name} ({k.symbol}): {'; '.join(wrong)}")


def without_kernel() -> list[str]:
    """Return the ops of CUDA C++ that CUDA tensors have no kernel for."""
    import torch

    from selfsup_kernels.core import ops

    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    names = [name for name in ops.SCHEMAS if "cuda" in ops.impls_of(name)]
    return [name for name in names if not has(f"{ops.NAMESPACE}::{name}.cuda", "CUDA")]


def print_contents(library: Path) -> int:
    """Say what is in the library, and load it into this process.

    A CPU-only torch lacks one function that the library calls to launch something. ``RTLD_LAZY`` does not look for
    functions before they are called; nothing is launched here.
    """
    import selfsup_kernels  # noqa: F401

    size = library.stat().st_size / 2**20
    ptx = sorted(set(re.findall(r"\.(sm_\w+)\.ptx", dump("--list-elf", library) + dump("--list-ptx", library))))
    print(f"{library}: {size:.0f} MB, machine code for {', '.join(architectures(library))}, PTX for {', '.join(ptx)}")
    process = ctypes.CDLL(None)  # ctypes' own way of loading adds RTLD_NOW
    process.dlopen.restype, process.dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    process.dlerror.restype = ctypes.c_char_p
    if not process.dlopen(str(library).encode(), os.RTLD_LAZY):
        raise RuntimeError(f"{library} does not load: {process.dlerror().decode()}")
    missing = without_kernel()
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
    if not sass.tool():
        print("cuda_static: needs cuobjdump, of Triton's wheel (pip install triton) or of the CUDA toolkit")
        return 1
    try:
        if options.contents:
            return print_contents(options.library.resolve())
        bounds, kernels = bounds_of(dump("-ptx", options.library)), []
        for a in architectures(options.library):
            usage = usage_of(dump("-res-usage", "-arch", a, options.library))
            counted = counts_of(dump("-sass", "-arch", a, options.library).splitlines())
            kernels += [kernel(s, a, usage[s], counts, bounds.get(s)) for s, counts in counted.items()]
    except RuntimeError as error:
        print(f"cuda_static: {error}")
        return 1
    print_kernels(kernels)
    if options.json:
        options.json.write_text(json.dumps([k._asdict() | {"problems": problems(k)} for k in kernels], indent=1) + "\n")
    failed = [k for k in kernels if problems(k)]
    print(f"{len(kernels)} kernels; {len(failed)} fail" if kernels else "no kernels were found")
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
