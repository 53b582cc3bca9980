"""Machine code that was compiled ahead of time, in the file ``_kernels.zip`` beside the extension: a first call then
waits for no compiler, and needs no Triton. ``python -m selfsup_kernels.lab.ahead`` (``make kernels``) writes it.

An entry is what a kernel becomes for one architecture, one set of constants and options, and one kind of each argument.
What is not in the file, Triton compiles. The file holds a digest of the kernels' source; after a change to that it is
not used until it is written again.
"""

import functools
import hashlib
import json
import os
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from selfsup_kernels.core import backends
from selfsup_kernels.tiles.code import Code, Descriptor, MapFacts

PACKAGE = Path(__file__).resolve().parents[1]
ENVIRONMENT = "SELFSUP_KERNELS_ARCHIVE"
"""Names another file, or is "0": Triton compiles all kernels."""

ARCHITECTURES = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 120}
"""Compute capability of a device -> that of the machine code that it runs."""

SOURCES = (
    *sorted((Path(__file__).parent / "kernels").glob("*.py")),
    Path(__file__).parent / "arguments.py",
    PACKAGE / "info_nce" / "call.py",
    PACKAGE / "info_nce" / "objectives.py",
)
"""All that the kernels are made of."""


class Treatment(NamedTuple):
    """What Triton makes of the values of a kernel's parameter."""

    constant: bool
    """Each value is a kernel of its own."""
    specialized: bool
    """Numbers that are 1 or multiples of 16 are."""
    aligned: bool
    """Addresses that are multiples of 16 are."""


def source_digest() -> str:
    """Return a digest of the kernels' source."""
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key(kernel: str, treatments, arguments, options: dict) -> str:
    """Return the name of an entry: one for all calls that may run the same machine code."""
    kinds = [_kind(value, *treatment) for value, treatment in zip(arguments, treatments, strict=False)]
    text = f"{kernel} {' '.join(kinds)} {sorted(options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kind(value, constant=False, specialized=True, aligned=True):
    if constant or value is None:
        return repr(value)
    if isinstance(value, Descriptor):
        return f"rows of {value.base.dtype} in blocks of {value.block}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{'*' if aligned and value.data_ptr() % 16 == 0 else ''}"
    if isinstance(value, tuple):  # whose elements are always specialized
        return f"({' '.join(map(_kind, value))})"
    if isinstance(value, int) and not isinstance(value, bool):
        if specialized and value == 1:
            return "1"
        wide = "int32" if -(2**31) <= value < 2**31 else "int64" if value < 2**63 else "uint64"
        return f"{wide}{'*' if specialized and value % 16 == 0 else ''}"
    return type(value).__name__ if not isinstance(value, float) else "float"


class Archive:
    """An open file."""

    def __init__(self, path: Path):
        self._file = zipfile.ZipFile(path)
        self._lock = threading.Lock()
        facts = json.loads(self._file.read("index.json"))
        self.source, self.versions = facts["source"], facts["versions"]
        self.kernels = {name: [Treatment(*t) for t in treatments] for name, treatments in facts["kernels"].items()}
        self.architectures: list[int] = facts["architectures"]
        self._loaded: dict[tuple, Code] = {}

    @functools.cache  # noqa: B019  (one archive in a process)
    def entries(self, architecture: int) -> dict[str, dict]:
        """Return the entries for an architecture, by name; empty if there are none."""
        if architecture not in self.architectures:
            return {}
        with self._lock:
            return json.loads(self._file.read(f"sm_{architecture}/index.json"))

    def find(self, kernel: str, capability: int, device: torch.device, arguments, options: dict) -> Code | None:
        """Return the code of a launch, loaded on ``device``, or None if Triton has to compile it."""
        architecture = ARCHITECTURES.get(capability)
        if architecture is None or kernel not in self.kernels:
            return None
        name = key(kernel, self.kernels[kernel], arguments, options)
        if (found := self._loaded.get((name, architecture, device))) is None and (
            entry := self.entries(architecture).get(name)
        ):
            with self._lock:
                image = self._file.read(entry["file"])
            maps = [MapFacts(*facts) for facts in entry["maps"]]
            found = Code(entry["name"], entry["signature"], entry["threads"], entry["shared_bytes"], maps)
            extension, _ = backends.load_extension()
            found = found._replace(
                function=extension.tape.load(
                    image, found.name, found.shared_bytes, device.index or 0, device.type == "cuda"
                )
            )
            self._loaded[name, architecture, device] = found
        return found


@functools.cache
def opened() -> Archive | None:
    """Return the archive of this package; None if it has none, or one of other kernels."""
    path = os.environ.get(ENVIRONMENT) or backends.ARCHIVE
    if path == "0" or backends.load_extension()[0] is None:
        return None
    try:
        archive = Archive(Path(path))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return archive if archive.source == source_digest() else None
