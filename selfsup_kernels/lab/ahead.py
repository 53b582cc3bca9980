"""Compile the GPU kernels of common calls ahead of time, without a GPU, and write ``selfsup_kernels/_kernels.zip``
(:mod:`selfsup_kernels.tiles.archive`).

    python -m selfsup_kernels.lab.ahead [--arch 90] [--out FILE] [--jobs 2]

The public functions are called as a user calls them, and each kernel that they would launch is compiled. Kernels that
Triton has in its cache are not compiled again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

# Before Triton is imported, here and in the processes that this one starts: interpreted kernels have no machine code.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # a third of the size

import torch

import selfsup_kernels as sk
from selfsup_kernels.lab import machine_code
from selfsup_kernels.tiles import archive, code, launcher

DIMS = (64, 128, 256, 512, 768, 1024, 2048)
"""Widths of embeddings that people train with; others with the same kernels come for nothing."""
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
"""Name -> (dtype, torch.set_float32_matmul_precision)."""
LARGE, SMALL = 32768, 1024
"""Rows of all views. Large calls have kernels for tiles without masks and for those with; small ones the latter."""

CASES = (
    {},
    {"temperature": True},
    {"reduction": "none"},
    {"queue": True, "objective": "cross_view"},  # MoCo
    {"labels": True},
)
"""Arguments of ``info_nce_loss``; True stands for a tensor that is made."""


class Job(NamedTuple):
    architecture: int
    precision: str
    dim: int


class Entry(NamedTuple):
    """One kernel, compiled."""

    kernel: str
    treatments: list[archive.Treatment]
    name: str
    code: code.Code
    image: bytes


def run(job: Job) -> list[Entry]:
    """Compile all kernels of one job."""
    dtype, matmul = PRECISIONS[job.precision]
    before, found = torch.get_float32_matmul_precision(), {}
    torch.set_float32_matmul_precision(matmul)

    def record(kernel, grid, *args, **options):
        treatments = [
            archive.Treatment(p.is_constexpr, not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            for p in kernel.params
        ]
        name = archive.key(kernel.__name__, treatments, args, options)
        if name not in found:
            compiled = kernel.warmup(*map(launcher.for_triton, args), grid=grid, **options)
            made = code.of_compiled(compiled)
            found[name] = Entry(kernel.__name__, treatments, name, made, compiled.asm["cubin"])

    try:
        with machine_code.compiling(job.architecture, record):
            for arguments, rows in product(CASES, (LARGE, SMALL)):
                call(arguments, rows, job.dim, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    return list(found.values())


def call(arguments: dict, rows: int, dim: int, dtype: torch.dtype, views: int = 2):
    """Call the loss and its backward with ``rows`` rows of zeros."""
    samples = rows // views
    given = [torch.zeros(samples, dim, dtype=dtype, requires_grad=True) for _ in range(views)]
    tensors = {
        "labels": torch.zeros(samples, dtype=torch.int64),
        "queue": torch.zeros(samples, dim, dtype=dtype),
        "temperature": torch.ones((), requires_grad=True),
    }
    arguments = {"temperature": 0.1} | {k: tensors[k] if v is True else v for k, v in arguments.items()}
    sk.info_nce_loss(given, impl="triton", **arguments).sum().backward()


def write(path: Path, entries: dict[int, list[Entry]]) -> None:
    """Write the entries of each architecture."""
    treatments = {entry.kernel: entry.treatments for found in entries.values() for entry in found}
    facts = {
        "source": archive.source_digest(),
        "versions": {"triton": machine_code.triton.__version__},
        "architectures": sorted(entries),
        "kernels": treatments,
    }
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.json", json.dumps(facts))
        for architecture, found in entries.items():
            index, files = {}, {}
            for entry in found:
                if entry.image not in files:
                    files[entry.image] = f"sm_{architecture}/{entry.name}.cubin"
                    file.writestr(files[entry.image], entry.image)
                index[entry.name] = {"file": files[entry.image]} | {
                    key: value for key, value in entry.code._asdict().items() if key != "function"
                }
            file.writestr(f"sm_{architecture}/index.json", json.dumps(index))
    os.replace(partial, path)


def main(arguments=None) -> int:
    known = sorted(set(archive.ARCHITECTURES.values()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=known, choices=known)
    parser.add_argument("--dtype", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="numbers of a row")
    parser.add_argument("--out", type=Path, default=archive.PATH)
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if launcher.INTERPRETED:
        print("ahead: TRITON_INTERPRET is set: kernels are interpreted, not compiled")
        return 2
    began = time.perf_counter()
    jobs = [Job(*job) for job in product(options.arch, options.dtype, options.dim)]
    entries = {architecture: {} for architecture in options.arch}
    # Not forked: torch and LLVM have threads by then.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, found in zip(jobs, pool.map(run, jobs), strict=True):
            entries[job.architecture] |= {entry.name: entry for entry in found}
    write(options.out, {architecture: list(found.values()) for architecture, found in entries.items()})
    counts = ", ".join(f"{len(found)} for sm_{architecture}" for architecture, found in entries.items())
    size = options.out.stat().st_size / 2**20
    print(f"{options.out}: {size:.1f} MB; kernels: {counts}; {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
