"""Read machine code with ``cuobjdump``: how often each instruction occurs in a kernel, and what the kernel takes."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HEADING = re.compile(r"^\s*Function\s*:?\s+(\S+?):?\s*$")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


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


def print_table(head, lines) -> None:
    """Print ``lines`` of texts below ``head``, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
