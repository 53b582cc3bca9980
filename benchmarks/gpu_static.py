"""Compile every shipped configuration of the Triton kernels, without a GPU; fail where the code is not right.

    python benchmarks/gpu_static.py [--arch 90] [--brief] [--json FILE] [--jobs 2]

For each architecture of the table of configurations, each width of rows and each dtype, the calls of
`selfsup_kernels/lab/ahead.py` are made, and each kernel that they would launch is compiled. The exit status is 1 where
one has a stack frame, keeps registers in local memory, asks for more shared memory than there is, or lacks the matrix
or copy instructions of its architecture.

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

# Before Triton is imported, here and in the processes that this one starts: interpreted kernels have no machine code.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import torch

from selfsup_kernels.lab import machine_code, sass
from selfsup_kernels.lab.ahead import PRECISIONS, Job, calls
from selfsup_kernels.tiles import configs

DIMS = (*configs.WIDTHS, 1024)
WITHOUT_PRODUCTS = (("bfloat16", 1024), ("tf32x3", 128))
"""Where the kernels without matrix products are compiled too: they have no configurations."""


def run(job: Job) -> list[dict]:
    """Compile the kernels of one job; return rows of the table."""
    named = []

    def wanted(kernel):
        return kernel in machine_code.MATRIX_KERNELS or job[1:] in WITHOUT_PRODUCTS

    # float16 has bfloat16's kernels but for one instruction.
    cases = job.cases()[:1] if job.precision == "float16" else job.cases()
    with machine_code.recording(job.architecture, wanted) as launches:
        calls(job, cases, lambda case: named.extend([case.name] * (len(launches) - len(named))))
    return [row(job, name, launch) for name, launch in zip(named, launches, strict=True)]


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
