"""Compile the GPU kernels of common calls ahead of time, without a GPU, and write ``selfsup_kernels/_kernels.zip``
(:mod:`selfsup_kernels.tiles.archive`).

    python -m selfsup_kernels.lab.ahead [--arch 90] [--out FILE] [--jobs 2]

The public functions are called as a user calls them, and each kernel that they would launch is compiled. Kernels that
Triton has in its cache are not compiled again. ``benchmarks/gpu_static.py`` checks the machine code of the same calls.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

# Before Triton is imported, here and in the processes that this one starts: interpreted kernels have no machine code.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # it takes a third of the file

import torch

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops
from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.info_nce.objectives import TABLE, Ids
from selfsup_kernels.lab import machine_code
from selfsup_kernels.tiles import archive, code, launcher

DIMS = (64, 128, 256, 512, 1024, 2048)
"""Rows of up to this many numbers share their kernels. The kernels of pairs are the same for all above 256."""
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
"""Name -> (dtype, torch.set_float32_matmul_precision)."""
LARGE, SMALL = 32768, 1024
"""Rows of all views. Large calls have kernels for tiles without masks and for those with; small ones the latter."""


class Case(NamedTuple):
    """One call of a loss."""

    name: str
    arguments: dict
    """Arguments of the loss; True stands for a tensor that is made."""
    deterministic: bool = False
    views: int = 2
    rows: int = SMALL
    loss: Callable = sk.info_nce_loss


PART = Case("part of a group", {}, rows=LARGE)
"""The calls of one process of a group between its exchanges with the others."""
EVERYWHERE = (
    Case("plain", {}, rows=LARGE),
    Case("small", {}),
    Case("temperature", {"temperature": True}),
    Case("queue", {"queue": True, "objective": "cross_view"}),  # MoCo's
    Case("labels", {"labels": True}, rows=LARGE),
    Case("small, labels", {"labels": True}),
    Case("sigmoid", {"scale": True, "bias": True}, rows=LARGE, loss=sk.siglip_loss),
)
# per_positive is the objective with most to compute for a pair of one class.
LABELS = {"labels": True, "queue": True, "reduction": "none", "objective": "per_positive"}
SCORES = {"queue": True, "core_view": 0, "normalize": False, "temperature": True}
ONCE = (
    Case("deterministic", {}, deterministic=True, rows=LARGE),
    PART,
    Case("labels, queue, determ.", LABELS, deterministic=True, rows=LARGE),
    Case("labels, supcon_in", {"labels": True, "objective": "supcon_in"}, rows=LARGE),
    Case("labels, decoupled", {"labels": True, "objective": "decoupled"}, rows=LARGE),
    Case("reduction=none", {"reduction": "none"}, rows=LARGE),
    Case("duplicates", {"duplicates": True}, rows=LARGE),
    Case("logq, cross_view", {"logq": True, "objective": "cross_view"}, rows=LARGE),
    Case("labels, cross_view", {"labels": True, "objective": "cross_view"}, rows=LARGE),
    # The slowest to compile: the tables have a column for each of nine, the copies a branch for each of eight views.
    Case("8 views, core, queue, scores", SCORES | {"objective": "pairwise", "reduction": "sum"}, views=8, rows=LARGE),
    Case("sigmoid, duplicates", {"duplicates": True, "reduction": "none"}, loss=sk.siglip_loss),
)
"""Cases that hardly depend on the architecture or the width, or that are rare."""


class Job(NamedTuple):
    architecture: int
    precision: str
    dim: int

    def cases(self):
        return EVERYWHERE + (ONCE if self == (90, "bfloat16", 128) else ())


class Entry(NamedTuple):
    """One kernel, compiled."""

    kernel: str
    treatments: list[archive.Treatment]
    name: str
    code: code.Code
    image: bytes


def run(job: Job) -> tuple[list[Entry], list[str]]:
    """Compile all kernels of one job. Return them, and what is said of those that do not compile."""
    found, failures = {}, []

    def record(kernel, grid, *args, **options):
        treatments = [
            archive.Treatment(p.is_constexpr, not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            for p in kernel.params
        ]
        name = archive.key(kernel.__name__, treatments, args, options)
        if name in found:
            return
        launch, compiled = machine_code.compile_kernel(kernel, grid, *args, **options)
        if compiled is None:
            failures.append(
                f"{launch.kernel} for sm_{job.architecture}, {job.precision}, D = {job.dim}: {launch.error}"
            )
        else:
            made = code.of_compiled(compiled)
            found[name] = Entry(kernel.__name__, treatments, name, made, compiled.asm["cubin"])

    with machine_code.compiling(job.architecture, record):
        calls(job, job.cases())
    return list(found.values()), failures


def calls(job: Job, cases: tuple[Case, ...], done: Callable[[Case], None] = lambda case: None) -> None:
    """Make these calls of a job, and call ``done`` after each."""
    dtype, matmul = PRECISIONS[job.precision]
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(matmul)
    try:
        for case in cases:
            torch.use_deterministic_algorithms(case.deterministic)
            _call(case, job.dim, dtype)
            done(case)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


def _call(case, dim, dtype):
    samples = case.rows // case.views
    views = [torch.zeros(samples, dim, dtype=dtype, requires_grad=case is not PART) for _ in range(case.views)]
    if case is PART:
        share = {"first": samples // 2, "count": samples // 2}
        known = {"ids": int(Ids.NONE), "core_view": -1, "normalize": True, "reduction": ops.REDUCTIONS.index("none")}
        sizes = {"num_views": case.views, "batch": samples, "dim": dim, "queue_rows": 0}
        objective = TABLE["supcon_out"]._asdict()
        made = Call(**sizes, **share, **known, **objective, eps=1e-12, temperature=0.1)
        forward, backward = (ops.overload(f"info_nce_{way}", "triton") for way in ("forward", "backward"))
        _, *saved = forward(views, None, None, None, None, *made)
        backward(torch.ones(case.views, samples), *saved, None, *made, False, dtype)
        return
    tensors = {
        "labels": torch.zeros(samples, dtype=torch.int64),
        "duplicates": torch.zeros(samples, dtype=torch.int64),
        "logq": torch.zeros(samples),
        "queue": torch.zeros(samples, dim, dtype=dtype),
        "temperature": torch.ones((), requires_grad=True),
        "scale": torch.ones((), requires_grad=True),
        "bias": torch.zeros((), requires_grad=True),
    }
    arguments = {k: tensors[k] if v is True else v for k, v in case.arguments.items()}
    if case.loss is sk.info_nce_loss:
        views, arguments = (views,), {"temperature": 0.1} | arguments
    case.loss(*views, impl="triton", **arguments).sum().backward()


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
    parser.add_argument("--arch", type=int, nargs="+", default=known, help="compute capabilities, as 90")
    parser.add_argument("--dtype", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="numbers of a row")
    parser.add_argument("--out", type=Path, default=backends.ARCHIVE)
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := [str(a) for a in options.arch if a not in archive.ARCHITECTURES]:
        print(f"ahead: only Triton compiles for {', '.join(unknown)}")
    options.arch = sorted({archive.ARCHITECTURES[a] for a in options.arch if a in archive.ARCHITECTURES})
    if not options.arch:
        return 0
    if launcher.INTERPRETED:
        print("ahead: TRITON_INTERPRET is set: kernels are interpreted, not compiled")
        return 2
    began = time.perf_counter()
    jobs = [Job(*job) for job in product(options.arch, options.dtype, options.dim)]
    entries, failures = {architecture: {} for architecture in options.arch}, []
    # Not forked: torch and LLVM have threads by then.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, (found, failed) in zip(jobs, pool.map(run, jobs), strict=True):
            entries[job.architecture] |= {entry.name: entry for entry in found}
            failures += failed
    write(options.out, {architecture: list(found.values()) for architecture, found in entries.items()})
    counts = ", ".join(f"{len(found)} for sm_{architecture}" for architecture, found in entries.items())
    size = options.out.stat().st_size / 2**20
    print(f"{options.out}: {size:.1f} MB; kernels: {counts}; {time.perf_counter() - began:.0f} s")
    print(*(f"FAILED: {failure}" for failure in failures), sep="\n", end="")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
