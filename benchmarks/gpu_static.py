"""Compile every shipped configuration of the Triton InfoNCE kernels, without a GPU; fail where the code is not right.

    python benchmarks/gpu_static.py [--arch 90] [--brief] [--json FILE] [--jobs 2]

For each architecture of the table of configurations, each width of rows and each dtype, the public functions are called
as a user calls them, and each kernel that they would launch is compiled. The exit status is 1 where one has a stack
frame, keeps registers in local memory, asks for more shared memory than there is, or lacks the matrix or copy
instructions of its architecture.

Compiled, not run: nothing here says that a kernel is right or fast. Kernels that Triton has in its cache are not
compiled again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

# Before Triton is imported, here and in the processes that this one starts: interpreted kernels have no machine code.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import torch

import selfsup_kernels as sk
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.info_nce.objectives import TABLE
from selfsup_kernels.lab import machine_code, sass
from selfsup_kernels.tiles import configs

DIMS = (*configs.WIDTHS, 1024)
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
    """One call of the loss."""

    name: str
    arguments: dict
    """Arguments of ``info_nce_loss``; True stands for a tensor that is made."""
    deterministic: bool = False
    views: int = 2
    rows: int = LARGE


PART = Case("part of a group", {})
"""The calls of one process of a group between its exchanges with the others."""
# per_positive is the objective with most to compute for a pair of one class.
LABELS = {"labels": True, "queue": True, "reduction": "none", "objective": "per_positive"}
SCORES = {"queue": True, "core_view": 0, "normalize": False, "temperature": True}
ONCE = (
    Case("labels, supcon_in", {"labels": True, "objective": "supcon_in"}),
    Case("labels, decoupled", {"labels": True, "objective": "decoupled"}),
    Case("cross_view, queue", {"queue": True, "objective": "cross_view", "reduction": "none"}),
    # The slowest to compile: the tables have a column for each of nine, the copies a branch for each of eight views.
    Case("8 views, core, queue, scores", SCORES | {"objective": "pairwise", "reduction": "sum"}, views=8),
)
"""Cases that hardly depend on the architecture or the width."""


class Job(NamedTuple):
    architecture: int
    precision: str
    dim: int

    def cases(self):
        """Yield (case, whether kernels without matrix products are compiled too: they have no configurations)."""
        every = (self.precision, self.dim) in (("bfloat16", 1024), ("tf32x3", 128))
        yield Case("plain", {}), every
        if self.precision != "float16":  # float16 has bfloat16's kernels but for one instruction
            yield Case("labels, queue, determ.", LABELS, deterministic=True), every
        if self.precision in ("bfloat16", "tf32x3"):
            yield Case("small", {}, rows=SMALL), False
        if (self.architecture, self.precision) == (90, "bfloat16"):
            yield Case("deterministic", {}, deterministic=True), False
            yield Case("labels", {"labels": True}), False
            yield PART, False
            yield from ((case, True) for case in ONCE if self.dim == 128)


def run(job: Job) -> list[dict]:
    """Compile all kernels of one job; return rows of the table."""
    dtype, matmul = PRECISIONS[job.precision]
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(matmul)
    named = []

    def wanted(kernel):
        return every or kernel in machine_code.MATRIX_KERNELS

    try:
        with machine_code.recording(job.architecture, wanted) as launches:
            for case, every in job.cases():  # noqa: B007 (`wanted` reads it)
                torch.use_deterministic_algorithms(case.deterministic)
                call(case, job.dim, dtype)
                named += [case.name] * (len(launches) - len(named))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])
    return [row(job, name, launch) for name, launch in zip(named, launches, strict=True)]


def call(case, dim, dtype):
    samples = case.rows // case.views
    views = [torch.zeros(samples, dim, dtype=dtype, requires_grad=case is not PART) for _ in range(case.views)]
    if case is PART:
        share = {"first": samples // 2, "count": samples // 2}
        known = {"labelled": False, "core_view": -1, "normalize": True, "reduction": ops.REDUCTIONS.index("none")}
        sizes = {"num_views": case.views, "batch": samples, "dim": dim, "queue_rows": 0}
        objective = TABLE["supcon_out"]._asdict()
        made = Call(**sizes, **share, **known, **objective, eps=1e-12, temperature=0.1)
        forward, backward = (ops.overload(f"info_nce_{way}", "triton") for way in ("forward", "backward"))
        _, *saved = forward(views, None, None, None, *made)
        backward(torch.ones(case.views, samples), *saved, None, *made, False, dtype)
        return
    tensors = {
        "labels": torch.zeros(samples, dtype=torch.int64),
        "queue": torch.zeros(samples, dim, dtype=dtype),
        "temperature": torch.ones((), requires_grad=True),
    }
    arguments = {"temperature": 0.1} | {k: tensors[k] if v is True else v for k, v in case.arguments.items()}
    sk.info_nce_loss(views, impl="triton", **arguments).sum().backward()


def row(job: Job, case: str, launch: machine_code.Launch) -> dict:
    """Return what is known of one kernel, as plain data; None for what there is no machine code for."""
    a, constants, code = job.architecture, launch.constants, launch.code
    name = launch.kernel.strip("_").removesuffix("_kernel")
    if constants.get("PART", "clean") != "clean":
        name += " masked"  # of the few tiles on the diagonal, or of all of a small call
    tile = "x".join(str(constants[f"BLOCK_{x}"]) for x in "MNK" if "BLOCK_M" in constants)
    facts = {"kernel": name, "arch": f"sm_{a}", "dtype": job.precision, "dim": job.dim, "case": case, "tile": tile}
    facts |= {"warps": launch.warps, "stages": launch.options.get("num_stages")}
    facts |= {key: code and getattr(code, key) for key in ("registers", "stack", "shared", "tensor_memory")}
    facts |= {"shared_limit": machine_code.RESOURCES[a].block_shared, "local": code and code.count("LDL|STL")}
    facts |= {
        "programs": code and machine_code.occupancy(code, launch.warps, a),
        "instructions": code and sum(code.counts.values()),
        "matrix": code and machine_code.matrix_count(code, a),
        "utmaldg": code and code.count("UTMALDG"),
    }
    return facts | {"problems": machine_code.problems(launch, a)}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=configs.ARCHITECTURES, choices=configs.ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="numbers of a row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row as data")
    parser.add_argument("--brief", action="store_true", help="print only the rows that fail")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if reason := machine_code.available():
        print(f"gpu-static: {reason}")
        return 2
    began = time.perf_counter()
    jobs = [Job(*job) for job in product(options.arch, options.dtype, options.dim)]
    # Not forked: torch and LLVM have threads by then.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [r for found in pool.map(run, jobs) for r in found]
    failing = [r for r in rows if r["problems"]]
    if shown := failing if options.brief else rows:
        lines = [[str(v) for v in (r | {"problems": "; ".join(r["problems"])}).values()] for r in shown]
        sass.print_table(list(shown[0]), lines)
    if options.json:
        versions = {"triton": machine_code.triton.__version__, "torch": torch.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    for r in failing:
        print(f"FAILS: {r['kernel']} {r['arch']} {r['dtype']} D={r['dim']} ({r['case']}): {'; '.join(r['problems'])}")
    print(f"{len(rows)} kernels compiled in {time.perf_counter() - began:.0f} s, {len(failing)} not fit to ship")
    return 1 if failing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
