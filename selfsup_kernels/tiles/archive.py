"""Read machine code that was compiled ahead of time from ``_kernels.zip``, which lies next to the extension. A first
call then needs neither a compiler nor Triton. ``python -m selfsup_kernels.lab.ahead`` (``make kernels``) writes it.

An entry is what a kernel becomes for one architecture, one set of constants and options, and one kind of each argument.
What is not in the file, Triton compiles. The file is of one state of this package's source: after a change it is not
used until it is written again.
"""

import functools
import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from selfsup_kernels.core import backends
from selfsup_kernels.core import validate as check
from selfsup_kernels.tiles.code import Code, Descriptor, MapFacts

ARCHITECTURES = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 120}
"""Compute capability of a device -> that of the machine code that it runs."""


class Treatment(NamedTuple):
    """What Triton makes of the values of a kernel's parameter."""

    constant: bool
    """Each value is a kernel of its own."""
    specialized: bool
    """Numbers that are 1 or multiples of 16 are."""
    aligned: bool
    """Addresses that are multiples of 16 are."""


@functools.cache
def source_digest() -> str:
    """Return a digest of all that the kernels and their entries are made of."""
    package = Path(__file__).resolve().parents[1]
    paths = [*(package / "tiles").rglob("*.py"), *(package / "info_nce" / f"{x}.py" for x in ("call", "objectives"))]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key(kernel: str, treatments, arguments, options: dict) -> str:
    """Return the name of an entry: one for all calls that may run the same machine code."""
    kinds = [_kind(value, *treatment) for value, treatment in zip(arguments, treatments, strict=False)]
    text = f"{source_digest()} {kernel} {' '.join(kinds)} {sorted(options.items())}"
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
    """The entries of a file. It is opened for each read, so that forked processes share no place in it and another file
    may take its place: an entry of other source has another name.

    Raises:
        ValueError: the file is of other source.
    """

    def __init__(self, path: Path):
        self.path = path
        facts = json.loads(self._read("index.json"))
        if facts["source"] != source_digest():
            raise ValueError(f"{path} was compiled from other source; `make kernels` writes it again")
        self.kernels = {name: [Treatment(*t) for t in treatments] for name, treatments in facts["kernels"].items()}
        self.architectures: list[int] = facts["architectures"]
        self._loaded: dict[tuple, Code | None] = {}

    def _read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.path) as file:
            return file.read(name)

    @functools.cache  # noqa: B019  (one archive in a process)
    def entries(self, architecture: int) -> dict[str, dict]:
        """Return the entries for an architecture, by name; empty if there are none."""
        return json.loads(self._read(f"sm_{architecture}/index.json")) if architecture in self.architectures else {}

    def find(self, kernel: str, capability: int, device: torch.device, arguments, options: dict) -> Code | None:
        """Return the code of a launch, loaded on ``device``, or None if Triton has to compile it."""
        architecture = ARCHITECTURES.get(capability)
        if architecture not in self.architectures or kernel not in self.kernels:
            return None
        place = key(kernel, self.kernels[kernel], arguments, options), architecture, device
        if place not in self._loaded:
            try:
                self._loaded[place] = self._load(*place)
            except Exception as error:  # a file that was replaced, a driver older than the code
                _warn(error)
                self._loaded[place] = None
        return self._loaded[place]

    def _load(self, name, architecture, device):
        entry = self.entries(architecture).get(name)
        if entry is None:
            return None
        maps = [MapFacts(*facts) for facts in entry["maps"]]
        code = Code(entry["name"], entry["signature"], entry["threads"], entry["shared_bytes"], maps)
        extension, _ = backends.load_extension()
        where = device.index or 0, device.type == "cuda"
        function = extension.tape.load(self._read(entry["file"]), code.name, code.shared_bytes, *where)
        return code._replace(function=function)


@functools.cache
def opened() -> Archive | None:
    """Return the archive of this package; None if there is none that can be used."""
    path = backends.archive_path()
    if path is None or backends.load_extension()[0] is None:
        return None
    try:
        return Archive(path)
    except Exception as error:  # of another version, or not an archive at all
        _warn(error)
        return None


def _warn(error):
    why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
    check.warn_once("archive", f"first calls compile their kernels, which takes seconds ({why})", RuntimeWarning)


def serves(capability: int) -> bool:
    """Return whether there is machine code for devices of this compute capability."""
    archive = opened()
    return archive is not None and ARCHITECTURES.get(capability) in archive.architectures
