"""Say what bounds each GPU kernel, by the hardware's own counters: every kernel of some calls under Nsight Compute.

    python benchmarks/gpu_counters.py [--out DIR] [--only TEXT ...]      or: make gpu-counters PYTHON=python3

Writes ``DIR/counters.json`` (default: ``benchmarks/results/<device>/``), and prints a line for each kernel: its time,
how busy the units are that can bound it, and what bounds it or its warps wait for. The clocks stay as they are, and so
do the caches. A time under the profiler is no benchmark: ``benchmarks/gpu.py`` is.

``ncu`` runs this file again for each call, with ``--call``, which makes it twice: the second time with the profiler on.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
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


def calls(quick=False):
    """Return ``{name: (workload, implementation)}``: each kind of kernel, at the sizes of the first tables."""
    from selfsup_kernels.lab.bench.workloads import case

    rows, pairs, model = (32, 48, "tiny") if quick else (16384, 262144, "ResNet-50")
    shapes = [(rows, dim, "bfloat16") for dim in (256, 128, 512)]
    shapes += [(rows, 256, "float32"), (rows // 16, 128, "bfloat16")]
    made = [("triton", case("info_nce", views=2, batch=b, dim=d, dtype=dtype)) for b, d, dtype in shapes]
    made += [("cuda", case("byol", views=1, batch=pairs, dim=256)), ("cuda", case("ema", model=model))]
    return {f"{impl}: {workload.label}": (workload, impl) for impl, workload in made}


def make_call(workload, impl):
    """Make one call twice, the second time with the profiler on."""
    import torch

    gpu = torch.cuda.is_available()
    function, part = workload.ours(impl), workload.parts[-1]
    inputs = workload.inputs("cuda" if gpu else "cpu")
    workload.run(part, function, inputs)  # compiles
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    workload.run(part, function, inputs)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def command(ncu, log, name):
    """Return the command that makes a call under the profiler."""
    return [
        *(ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
        *("--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"),
        *("--section", "WarpStateStats", "--metrics", ",".join([*UNITS.values(), *FACTS.values()])),
        *(sys.executable, str(Path(__file__).resolve()), "--call", name),
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


def measure(ncu, names, folder):
    """Make the calls under the profiler; return the exit status."""
    measured = {}
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            log = Path(temporary) / "ncu.csv"
            status = subprocess.run(command(ncu, log, name), stdin=subprocess.DEVNULL, cwd=ROOT).returncode
            text = log.read_text(errors="replace") if log.exists() else ""
        measured[name] = [describe(*kernel) for kernel in parse(text)]
        if status or not measured[name]:
            print(f"gpu-counters: {name}: no counters were read (ncu's exit status is {status})")
            print(*[line for line in text.splitlines() if line.startswith("==") and "==PROF==" not in line], sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counters.json").write_text(json.dumps(measured, indent=1) + "\n")
    show(measured)
    return 0 if all(measured.values()) else 1


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="calls whose name holds one of these")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call:
        make_call(*calls()[options.call])
        return 0
    import torch

    from selfsup_kernels.lab.bench import results

    ncu, reason = shutil.which("ncu"), None
    names = [name for name in calls() if not options.only or any(text in name for text in options.only)]
    if not ncu:
        reason = "ncu is not on PATH: it comes with the CUDA toolkit, as Nsight Compute"
    elif not torch.cuda.is_available():
        reason = f"needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees none"
    elif not names:
        reason = f"--only: expected a part of one of {', '.join(calls())}, got {' '.join(options.only)}"
    if reason:
        print(f"gpu-counters: {reason}")
        return 2
    device = results.folder_name({"device": torch.cuda.get_device_name()})
    return measure(ncu, names, (options.out or ROOT / "benchmarks" / "results" / device).resolve())


if __name__ == "__main__":
    sys.exit(main())
