"""Compiles every shipped configuration of the GPU kernels, without a GPU; fails where the machine code is not right.

    python benchmarks/gpu_static.py [--arch 90] [--brief] [--json FILE] [--jobs 2]

For each architecture of the table of configurations, each width of rows and each dtype, the public functions are called
as a user calls them, and each kernel that they would launch is compiled. The exit status is 1 where one has a stack
frame, keeps registers in local memory, asks for more shared memory than there is, or lacks the matrix or copy
instructions of its architecture. Beside that stands a prediction of the fraction of the matrix units' rate
(``gpu_model.py``): the number that a measurement on a GPU is to be compared with.

Compiled, not run: nothing here says that a kernel is right or fast.

Kernels that Triton has in its cache are not compiled again, and what was read from them is kept there too.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Before Triton is imported, here and in the processes that this one starts: interpreted kernels have no machine code.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import gpu_model
import torch

import selfsup_kernels as sk
from selfsup_kernels.core import ops
from selfsup_kernels.lab import machine_code
from selfsup_kernels.tiles import configs

ARCHITECTURES = configs.ARCHITECTURES
LONG = 1024
DIMS = (*configs.WIDTHS, LONG)
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
"""Name -> (dtype, torch.set_float32_matmul_precision)."""
LARGE, SMALL = 32768, 1024
"""Rows of all views. A large call has kernels for tiles without masks and for those with, and waves of full width; in a
small one all tiles are of one launch."""


class Case(NamedTuple):
    """One call of a loss."""

    name: str
    labels: bool = False
    queue: bool = False
    deterministic: bool = False
    reduction: str = "mean"
    objective: str = "supcon_out"
    views: int = 2
    core_view: int | None = None
    normalize: bool = True
    learned: bool = False
    """The temperature is a tensor that requires grad."""
    rows: int = LARGE
    part: bool = False
    """One process's half of the samples."""


EVERYWHERE = (
    Case("plain"),
    # per_positive is the objective with most to compute for a pair of one class.
    Case("labels, queue, determ.", True, True, True, "none", "per_positive"),
)
"""For every architecture, width and dtype; float16 has the first alone, whose kernels are those of bfloat16 but for one
instruction."""
FULL = (Case("small", rows=SMALL),)
"""In bfloat16 and full float32."""
WIDER = (
    Case("deterministic", deterministic=True),
    Case("labels", labels=True),
    Case("part of a group", reduction="none", part=True),
)
WIDER_ARCHITECTURE = 90
"""Where these cases are told apart, in bfloat16: elsewhere each of them is seen in one of the above."""
ONCE = (
    *(Case(f"labels, {name}", labels=True, objective=name) for name in ("supcon_in", "decoupled")),
    Case("cross_view, queue", queue=True, objective="cross_view", reduction="none"),
    # The slowest to compile: the tables have a column for each of nine, the copies a branch for each of eight views.
    Case("8 views, core, queue, scores", False, True, False, "sum", "pairwise", 8, 0, False, True),
)
"""On one architecture, at one width in bfloat16: what hardly depends on either."""
ROWS = (("bfloat16", LONG), ("tf32x3", 128))
"""Kernels that pass over the rows have no configurations: two of them show what there is to see."""
BYOL_VIEWS = {256: 2, 2048: 3}
"""Of rows of so many numbers. From three views on the kernels are others."""


class Job(NamedTuple):
    architecture: int
    precision: str
    op: str
    dim: int


def jobs(architectures, precisions, ops, dims) -> list[Job]:
    found = []
    for a in architectures:
        for p in precisions:
            if "info_nce" in ops:
                found += [Job(a, p, "info_nce", dim) for dim in dims]
            if "byol" in ops and p in ("bfloat16", "tf32x3"):
                found += [Job(a, p, "byol", dim) for dim in BYOL_VIEWS]
        if "ema" in ops:
            found.append(Job(a, "tf32x3", "ema", 0))
    return found


def run(job: Job) -> list[dict]:
    """The rows of the table that one job makes."""
    dtype, matmul = PRECISIONS[job.precision]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        return {"info_nce": _info_nce, "byol": _byol, "ema": _ema}[job.op](job, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


def _info_nce(job, dtype):
    cases = list(EVERYWHERE[:1] if job.precision == "float16" else EVERYWHERE)
    if job.precision in ("bfloat16", "tf32x3"):
        cases += FULL
    if job.precision == "bfloat16" and job.architecture == WIDER_ARCHITECTURE:
        cases += WIDER
    if job[:2] == (90, "bfloat16") and job.dim == 128:
        cases += ONCE
    rows = {}
    for case in cases:
        with_rows = case in ONCE or ((job.precision, job.dim) in ROWS and case in EVERYWHERE)

        def wanted(kernel, with_rows=with_rows):
            return with_rows or kernel in machine_code.MATRIX_KERNELS

        with machine_code.recording(job.architecture, wanted) as launches:
            _call_info_nce(case, job.dim, dtype)
        for launch in launches:
            rows.setdefault(launch.key, row(job, case.name, launch, dtype.itemsize))
    return list(rows.values())


def _call_info_nce(case, dim, dtype):
    samples = case.rows // case.views
    torch.use_deterministic_algorithms(case.deterministic)
    if case.part:
        return _call_part([torch.zeros(samples, dim, dtype=dtype) for _ in range(case.views)], samples // 2)
    views = [torch.zeros(samples, dim, dtype=dtype, requires_grad=True) for _ in range(case.views)]
    loss = sk.info_nce_loss(
        views,
        temperature=torch.ones((), requires_grad=True) if case.learned else 0.1,
        objective=case.objective,
        labels=torch.zeros(samples, dtype=torch.int64) if case.labels else None,
        queue=torch.zeros(samples, dim, dtype=dtype) if case.queue else None,
        core_view=case.core_view,
        normalize=case.normalize,
        reduction=case.reduction,
        impl="triton",
    )
    loss.sum().backward()


def _call_part(views, count):
    """What a process of a group does between its exchanges with the others."""
    forward, backward = (ops.get(f"info_nce_{way}", "triton") for way in ("forward", "backward"))
    _, *saved = forward(views, None, None, None, 0.1, 0, -1, True, 1e-12, 0, count, count)
    upstream = torch.ones(len(views), len(views[0]))
    sizes = (len(views), *views[0].shape)
    backward(upstream, *saved, None, None, 0.1, *sizes, 0, -1, True, 0, False, views[0].dtype, count, count)


def _byol(job, dtype):
    views = BYOL_VIEWS[job.dim]
    with machine_code.recording(job.architecture) as launches:
        p, t = (torch.zeros(views, LARGE, job.dim, dtype=dtype, requires_grad=grad) for grad in (True, False))
        sk.byol_loss(p, t, impl="triton").backward()
    name = str(dtype).removeprefix("torch.")
    return [row(job, f"{views} views", launch, dtype.itemsize) | {"dtype": name} for launch in launches]


def _ema(job, dtype):
    rows = {}
    for name, rounding in (("plain", False), ("stochastic rounding", True)):
        with machine_code.recording(job.architecture) as launches:
            targets = [torch.zeros(64, 64, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16)]
            sources = [t.float() for t in targets]
            sk.ema_update_(targets, sources, 0.99, stochastic_rounding=rounding, impl="triton")
        for launch in launches:
            rows.setdefault(launch.key, row(job, name, launch, dtype.itemsize) | {"dtype": "mixed"})
    return list(rows.values())


def row(job: Job, case: str, launch: machine_code.Launch, item_size: int) -> dict:
    """Everything known of one kernel, as plain data."""
    a, code = job.architecture, launch.code
    kernel = launch.kernel.strip("_").removesuffix("_kernel")
    name = f"byol {kernel}" if launch.module == "byol" else kernel
    if launch.constants.get("PART", "clean") != "clean":
        name = f"{kernel} masked"  # of the few tiles on the diagonal, or of all of a small call
    programs = 1
    if kernel == "sums":
        entry = "sums" if launch.constants["PART"] == "clean" else "masked_sums"
        programs = configs.lookup(entry, a, PRECISIONS[job.precision][0], job.dim).programs
    limit = machine_code.RESOURCES[a].block_shared
    result = {
        "kernel": name,
        "arch": f"sm_{a}",
        "dtype": job.precision,
        "dim": job.dim,
        "case": case,
        "tile": "x".join(str(launch.constants[f"BLOCK_{x}"]) for x in "MNK" if "BLOCK_M" in launch.constants),
        "warps": launch.warps,
        "stages": launch.options.get("num_stages"),
        "descriptor": bool(launch.constants.get("DESCRIPTOR")),
        "shared_limit": limit,
        "problems": machine_code.problems(launch, a),
        "remarks": machine_code.remarks(launch, a, programs),
    }
    if code is not None:
        prediction = gpu_model.predict(launch, a, job.dim, item_size, programs)
        result |= {
            "registers": code.registers,
            "stack": code.stack,
            "shared": code.shared,
            "tensor_memory": code.tensor_memory,
            "programs": machine_code.occupancy(code, launch.warps, a),
            "instructions": sum(code.counts.values()),
            "matrix": machine_code.matrix_count(code, a),
            "hmma": code.count("HMMA"),
            "utmaldg": code.count("UTMALDG"),
            "local": code.count("LDL", "STL"),
            "prediction": prediction and prediction._asdict(),
        }
    return result


# ---------------------------------------------------------------- the table

COLUMNS = {
    "kernel": lambda r: r["kernel"],
    "arch": lambda r: r["arch"],
    "dtype": lambda r: r["dtype"],
    "D": lambda r: str(r["dim"] or ""),
    "case": lambda r: r["case"],
    "tile": lambda r: r["tile"],
    "warps/stages": lambda r: f"{r['warps']}/{r['stages'] or '-'}" + (" TMA" if r["descriptor"] else ""),
    "regs": lambda r: str(r["registers"]),
    "stack": lambda r: str(r["stack"]),
    "shared/limit KB": lambda r: f"{r['shared'] / 1024:.0f}/{r['shared_limit'] // 1024}",
    "fit": lambda r: str(r["programs"]),
    "matrix": lambda r: str(r["matrix"] or (f"{r['hmma']} HMMA" if r["hmma"] else "")),
    "copies": lambda r: str(r["utmaldg"] or ""),
    "LDL+STL": lambda r: str(r["local"]),
    "ex2/tile": lambda r: _of(r, "exponentials", "{:.0f}"),
    "shfl/tile": lambda r: _of(r, "shuffles", "{:.0f}"),
    "clocks m/e/v/mem": lambda r: "/".join(_of(r, k, "{:.0f}") for k in ("matrix", "exponential", "vector", "memory")),
    "peak": lambda r: _of(r, "fraction", "{:.0%}"),
    "": lambda r: "FAILS: " + "; ".join(r["problems"]) if r["problems"] else "; ".join(r["remarks"]),
}
LEGEND = """fit: programs that fit a multiprocessor; matrix: the architecture's matrix instructions in the code; copies:
UTMALDG; ex2, shfl: a thread's for one tile; clocks: matrix, exponential, other vector work and memory of a tile; peak:
predicted fraction of the matrix units' rate (gpu_model.py), compiled and not run."""


def _of(r, part, form):
    return form.format(r["prediction"][part]) if r.get("prediction") else ""


def cells(r) -> list[str]:
    if "registers" in r:
        return [column(r).replace("///", "") for column in COLUMNS.values()]
    known = ("kernel", "arch", "dtype", "D", "case", "tile", "warps/stages", "")
    return [column(r) if name in known else "" for name, column in COLUMNS.items()]


def print_table(rows) -> None:
    lines = [cells(r) for r in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(x) for x in column) for column in zip(COLUMNS, *lines, strict=True)]
        for line in [list(COLUMNS), *lines]:
            print("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, no_wrap=bool(name), overflow="fold", min_width=20 if not name else None)
    for r, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="red" if r["problems"] else None)
    console = Console()
    # A file or a pipe has no width: lines of a table that are folded cannot be searched.
    (console if console.is_terminal and console.width >= 200 else Console(width=300)).print(table)


def unlaunched(rows) -> list[str]:
    """Entries of the table that no call of a full run used: what is not seen here could be anything."""
    keys = ("arch", "kernel", "dtype", "dim", "tile", "warps", "stages")
    seen = {tuple(r[k] for k in keys) for r in rows}
    missing = []
    for arch, kernels in json.loads(configs.TABLE.read_text()).items():
        for kernel, kinds in kernels.items():
            name = kernel.removeprefix("masked_") + (" masked" if kernel in ("masked_sums", "masked_gradient") else "")
            for kind, widths in kinds.items():
                for width, c in widths.items():
                    dim = LONG if width == "long" else int(width)
                    tile = "x".join(str(c[f"block_{x}"]) for x in "mnk")
                    dtype = "bfloat16" if kind == "half" else kind
                    if (arch, name, dtype, dim, tile, c["num_warps"], c["num_stages"]) not in seen:
                        missing.append(f"{arch} {kernel} {kind} {width}")
    return missing


def collect(work: list[Job], processes: int) -> list[dict]:
    if processes == 1:
        return _gathered(work, map(run, work))
    # Not forked: torch and LLVM have threads by then.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _gathered(work, pool.map(run, work))


def _gathered(work, results):
    """All rows; one line of progress for each architecture, since the whole takes minutes."""
    rows, began = [], time.perf_counter()
    for n, (job, found) in enumerate(zip(work, results, strict=True), 1):
        rows += found
        if n == len(work) or work[n].architecture != job.architecture:
            seconds = time.perf_counter() - began
            print(f"up to sm_{job.architecture}: {len(rows)} kernels, {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="N")
    parser.add_argument("--dtype", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--op", nargs="+", default=["info_nce", "byol", "ema"], choices=["info_nce", "byol", "ema"])
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, help="rows of InfoNCE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row as data")
    parser.add_argument("--brief", action="store_true", help="print only the rows that fail")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    reason = machine_code.available()
    if reason:
        print(f"gpu-static: {reason}")
        return 2
    began = time.perf_counter()
    present = [op for op in options.op if (Path(configs.__file__).with_name(f"{op}.py")).exists()]
    rows = collect(jobs(options.arch, options.dtype, present, options.dim), options.jobs)
    failing = [r for r in rows if r["problems"]]
    shown = failing if options.brief else rows
    if shown:
        print_table(shown)
        print(LEGEND)
    if options.json:
        versions = {"triton": machine_code.triton.__version__, "torch": torch.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    if set(options.arch) == set(ARCHITECTURES) and options.dtype == list(PRECISIONS) and options.dim == DIMS:
        missing = unlaunched(rows)
        if missing:
            print(f"{len(missing)} entries of the table that no call uses: {', '.join(missing)}")
    for r in failing:
        where = f"{r['kernel']} sm_{r['arch'][3:]} {r['dtype']} D={r['dim']} ({r['case']})"
        print(f"FAILS: {where}: {'; '.join(r['problems'])}")
    print(f"{len(rows)} kernels compiled in {time.perf_counter() - began:.0f} s, {len(failing)} not fit to ship")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
