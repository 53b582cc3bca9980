"""What bounds each GPU kernel, by the hardware's own counters: every kernel of some calls once, under Nsight Compute.

    python benchmarks/gpu_counters.py [--out DIR] [--only TEXT ...]      or: make gpu-counters PYTHON=python3

Writes ``DIR/counters.json`` (default: ``benchmarks/results/<device>/``), and prints a line for each kernel: its time,
how busy the units are that can bound it, and what bounds it or its warps wait for. The clocks stay as they are
(``--clock-control none``), and so do the caches. A time under the profiler is no benchmark: ``benchmarks/gpu.py`` is.

``ncu`` runs this file once more, with ``--calls``: each call is made twice, the second time with the profiler on, and a
kernel that only waits is launched between two calls, so that the profiler's list can be divided among them.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout

PEAK = ".avg.pct_of_peak_sustained_elapsed"
UNITS = {
    "tensor": "sm__pipe_tensor_cycles_active" + PEAK,
    "xu": "sm__inst_executed_pipe_xu" + PEAK,
    "fma": "sm__inst_executed_pipe_fma" + PEAK,
    "alu": "sm__inst_executed_pipe_alu" + PEAK,
    "issue": "smsp__issue_active" + PEAK,
    "L1": "l1tex__throughput" + PEAK,
    "L2": "lts__throughput" + PEAK,
    "memory": "dram__throughput" + PEAK,
}
"""Name -> the share of its peak at which the unit worked, in percent of the kernel's time. The exponentials of a
softmax are the xu's, with all conversions between integers and floats; L1 is shared memory too."""

FACTS = {
    "ns": "gpu__time_duration.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
"""Warps that wait for this reason whenever one issues: the section WarpStateStats has one for each reason."""

BUSY = 60
"""Percent of its peak from which on a unit is said to bound a kernel: below, nothing is full and latency does."""

MARK = "spin_kernel"
"""PyTorch's name of the kernel that only waits, launched between two calls."""


def calls(quick):
    """(name, workload, implementation): each kind of kernel, at the sizes that the first tables are about."""
    from selfsup_kernels.lab.bench.workloads import case

    rows, pairs, model = (32, 48, "tiny") if quick else (16384, 262144, "ResNet-50")
    shapes = [(rows, dim, "bfloat16") for dim in (256, 128, 512)] + [
        (rows, 256, "float32"),
        (rows // 16, 128, "bfloat16"),
    ]
    made = [("triton", case("info_nce", views=2, batch=b, dim=d, dtype=dtype)) for b, d, dtype in shapes]
    made += [("cuda", case("byol", views=1, batch=pairs, dim=256)), ("cuda", case("ema", model=model))]
    return [(f"{impl}: {made.label}", made, impl) for impl, made in made]


def chosen(only, quick):
    """The calls whose name holds one of the texts, or all."""
    return [c for c in calls(quick) if not only or any(text in c[0] for text in only)]


def make_calls(only, quick):
    """Make each call, the second time with the profiler on."""
    import torch

    gpu = torch.cuda.is_available()
    for name, made, impl in chosen(only, quick):
        function, part = made.ours(impl), made.parts[-1]
        try:
            inputs = made.inputs("cuda" if gpu else "cpu")
            made.run(part, function, inputs)  # compiles
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            made.run(part, function, inputs)
        except Exception as error:  # the other calls run all the same
            print(f"FAILED {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
        if gpu:
            torch.cuda.profiler.start()  # also where the call failed before it: its mark has to be seen
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def command(ncu, log, only):
    """What runs this file under the profiler."""
    return [
        *(ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
        *("--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"),
        *("--section", "WarpStateStats", "--metrics", ",".join([*UNITS.values(), *FACTS.values()])),
        *(sys.executable, str(Path(__file__).resolve()), "--calls", "--only", *only),
    ]


def parse(text):
    """Read the profiler's table, a row for each kernel in order of launch: ``[(kernel, {metric: value})]``."""
    kernels = []
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        if row["ID"]:  # the first line has the units
            metrics = {}
            for name, value in row.items():
                if value and re.fullmatch(r"[\d,]+(\.\d+)?", value):
                    metrics[name] = float(value.replace(",", ""))
            kernels.append((row["Kernel Name"], metrics))
    return kernels


def describe(name, metrics):
    """Make a row of the results: one kernel, and what bounds it."""
    units = {unit: metrics[metric] for unit, metric in UNITS.items() if metric in metrics}
    stalls = {match[1]: value for metric, value in metrics.items() if (match := STALL.fullmatch(metric))}
    stalls.pop("selected", None)  # such a warp has not waited
    stalls = dict(sorted(stalls.items(), key=lambda item: -item[1])[:4])
    if not units:
        bound = "unknown: the profiler gave no counters"
    else:
        unit = max(units, key=units.get)
        bound = f"{unit} {units[unit]:.0f} %"
        if units[unit] < BUSY:
            bound = f"latency: {bound} at most" + (f", waits on {next(iter(stalls))}" if stalls else "")
    name = re.sub(r"[<(].*", "", name.replace("(anonymous namespace)::", ""))  # no template arguments, no parameters
    facts = {fact: metrics.get(metric) for fact, metric in FACTS.items()}
    return {"kernel": re.split(r"::| ", name)[-1]} | facts | {"units": units, "stalls": stalls, "bound": bound}


def divide(kernels, names):
    """The kernels of each call: ``{name: rows}``. Raises ValueError where the marks between them do not fit."""
    groups = [[]]
    for name, metrics in kernels:
        if MARK in name:
            groups.append([])
        else:
            groups[-1].append(describe(name, metrics))
    if groups.pop() or len(groups) != len(names):
        raise ValueError(f"{len(groups)} calls between the marks of the profiler's list, {len(names)} were to be made")
    return dict(zip(names, groups, strict=True))


def show(measured):
    from selfsup_kernels.lab import sass

    def cell(value, form=".0f"):
        return "-" if value is None else format(value, form)

    for name, rows in measured.items():
        print(f"\n{name}")
        lines = []
        for row in rows:
            ms = cell(row["ns"] and row["ns"] / 1e6, ".4g")
            percents = [cell(row["units"].get(unit)) for unit in UNITS]
            rest = [cell(row["occupancy_percent"]), cell(row["registers"]), row["bound"]]
            lines.append([row["kernel"], ms, *percents, *rest])
        sass.print_table(("kernel", "ms", *UNITS, "occ.", "regs", "bound by"), lines)


def measure(ncu, only, folder):
    """Run the calls under the profiler. Returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "counters.csv"
    log.unlink(missing_ok=True)
    run = subprocess.run(command(ncu, log, only), stdin=subprocess.DEVNULL, cwd=ROOT)
    text = log.read_text(errors="replace") if log.exists() else ""
    print(*[line for line in text.splitlines() if line.startswith("==") and "==PROF==" not in line][-20:], sep="\n")
    kernels, names = parse(text), [name for name, *_ in chosen(only, quick=False)]
    if run.returncode or not kernels:
        print(f"gpu-counters: no counters were read (ncu's exit status is {run.returncode}); see {log}")
        return 1
    try:
        measured = divide(kernels, names)
    except ValueError as error:
        measured = {"calls, not divided": [describe(*kernel) for kernel in kernels]}
        print(f"gpu-counters: {error}")
    (folder / "counters.json").write_text(json.dumps(measured, indent=1) + "\n")
    show(measured)
    missing = {*UNITS.values(), *FACTS.values()}.difference(*(metrics for _, metrics in kernels))
    print(*(f"the profiler knows no {metric}" for metric in sorted(missing)), folder / "counters.json", sep="\n")
    return 0 if list(measured) == names and all(measured.values()) else 1


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="calls whose name holds one of these")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.calls:
        make_calls(options.only, options.quick)
        return 0
    import torch

    from selfsup_kernels.lab.bench import results

    ncu, reason = shutil.which("ncu"), None
    if not ncu:
        reason = "ncu is not on PATH: it comes with the CUDA toolkit, as Nsight Compute"
    elif not torch.cuda.is_available():
        reason = f"needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees none"
    elif not chosen(options.only, quick=False):
        names = ", ".join(name for name, *_ in calls(quick=False))
        reason = f"no call has {' or '.join(options.only)} in its name; there are: {names}"
    if reason:
        print(f"gpu-counters: {reason}")
        return 2
    device = results.folder_name({"device": torch.cuda.get_device_name()})
    return measure(ncu, options.only, (options.out or ROOT / "benchmarks" / "results" / device).resolve())


if __name__ == "__main__":
    sys.exit(main())
