"""Read machine code with ``cuobjdump`` and ``nvdisasm``: how often each instruction occurs in a kernel, and what the
kernel takes."""

import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HEADING = re.compile(r"^\s*Function\s*:?\s+(\S+?):?\s*$")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
INSTRUCTION_BYTES = 16


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    local: int


def tool() -> Path | None:
    """Return the cuobjdump of Triton's wheel, else that of the CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"] if triton else []
    places += [Path(p) for p in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump") if p]
    return next((place for place in places if place.exists()), None)


def dump(*arguments) -> str:
    """Return what ``cuobjdump`` prints; raise RuntimeError with its message where it fails."""
    done = subprocess.run([tool(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def usage_of(text: str) -> dict[str, Usage]:
    """Read ``cuobjdump -res-usage``, by symbol."""
    found, symbol = {}, None
    for line in text.splitlines():
        if heading := HEADING.match(line):
            symbol = heading[1]
        elif symbol and (usage := USAGE.search(line)):
            found[symbol] = Usage(*map(int, usage.groups()))
    return found


def counts_of(lines) -> dict[str, Counter]:
    """Count the instructions in ``cuobjdump -sass``, by symbol."""
    found, counts = {}, Counter()
    for line in lines:
        if heading := HEADING.match(line):
            counts = found.setdefault(heading[1], Counter())
        elif instruction := INSTRUCTION.match(line):
            counts[instruction[1]] += 1
    return found


def counts_of_cubins(cubins: list[bytes], architecture: int) -> list[Counter]:
    """Count the instructions of cubins that have one kernel each.

    One process of nvdisasm has them all, as raw instructions behind each other: it needs 0.4 s to start, which is ten
    times what a kernel takes.
    """
    if not cubins:
        return []
    codes = [code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = f"SM{architecture}" + "a" * (architecture >= 90)  # Triton compiles for the features of 90a and the like
        done = subprocess.run(
            [tool().with_name("nvdisasm"), "--binary", name, file.name], capture_output=True, text=True
        )
    found = [match[1] for match in map(INSTRUCTION.match, done.stdout.splitlines()) if match]
    sizes = [len(code) // INSTRUCTION_BYTES for code in codes]
    if done.returncode or len(found) != sum(sizes):
        raise RuntimeError(f"nvdisasm: {len(found)} of {sum(sizes)} instructions {done.stderr.strip()}")
    rest = iter(found)
    return [Counter(itertools.islice(rest, size)) for size in sizes]


def code_of(cubin: bytes) -> bytes:
    """Return the instructions of the only kernel in a cubin, which is a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # Of a section: the offset of its name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[names][4]
    (code,) = [s for s in sections if cubin.startswith(b".text.", names + s[0])]
    return cubin[code[4] : code[4] + code[5]]


def print_table(head, lines) -> None:
    """Print ``lines`` of texts below ``head``, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
