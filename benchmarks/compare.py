"""Ratios side by side: every rival of a workload in turn, round after round, in one process; medians; results as data.

    python benchmarks/compare.py [--out FOLDER] [--rounds N]

The machines that this runs on are shared: a ratio of interleaved medians survives what a single timing does not. Writes
``<out>/<op>.json`` (default ``benchmarks/results/<device>/``), from which ``benchmarks/tables.py`` makes the README's
tables. The matrix-product rate that fractions refer to is measured in the same rounds.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import timing
import torch
import workloads as w
from timing import interleave

from selfsup_kernels import backends


def header():
    extension, reason = backends.load_extension()
    return {
        "device": timing.processor_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": extension.cpu_capability() if extension else reason,
        **timing.versions(),
    }


def matrix_product():
    a, b, c = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    return lambda: torch.mm(a, b, out=c)


def info_nce(rounds):
    rows = []
    for batch, dim in w.INFO_NCE_SHAPES:
        inputs = w.info_nce_inputs(batch, dim)
        few = rounds if batch >= 2048 else 5 * rounds
        for part in ("forward", "both"):
            run = w.forward if part == "forward" else w.both
            calls = {name: partial(run, f, inputs) for name, f in w.INFO_NCE.items()}
            times = interleave({**calls, "matrix product 2048^3": matrix_product()}, few)
            product = 2 * 2048**3 / times.pop("matrix product 2048^3")["p50_ms"] / 1e6
            rate = w.info_nce_operations(2 * batch, dim, part, "cpu") / times["selfsup_kernels"]["p50_ms"] / 1e6
            rows.append(
                {
                    "views": 2,
                    "batch": batch,
                    "dim": dim,
                    "dtype": "float32",
                    "part": part,
                    "times": times,
                    "gflops": rate,
                    "matrix_product_gflops": product,
                    "fraction": rate / product,
                }
            )
            show(rows[-1])
    return rows


def byol(rounds):
    rows = []
    for batch, dim in w.BYOL_SHAPES:
        inputs = w.byol_inputs(batch, dim)
        for part in ("forward", "both"):
            run = w.forward if part == "forward" else w.both
            times = interleave({name: partial(run, f, inputs) for name, f in w.BYOL.items()}, 2 * rounds)
            rows.append({"batch": batch, "dim": dim, "dtype": "float32", "part": part, "times": times})
            show(rows[-1])
    return rows


def ema(rounds):
    rows = []
    for dtype, rivals in w.EMA.items():
        inputs = w.ema_inputs(getattr(torch, dtype))
        calls = {name: partial(f, *inputs) for name, f in rivals.items()}
        flat = torch.randn(25_557_032)
        calls |= {"the op alone": partial(w.our_ema_op, *inputs), "scaling in place": partial(flat.mul_, 1.0)}
        times = interleave(calls, 3 * rounds)
        numel = sum(t.numel() for t in inputs[0])
        size = (8 + inputs[1][0].element_size()) * numel
        copy = 8 * flat.numel() / times.pop("scaling in place")["p50_ms"] / 1e6
        rate = size / times["the op alone"]["p50_ms"] / 1e6
        rows.append(
            {
                "model": "ResNet-50",
                "tensors": len(inputs[0]),
                "numbers": numel,
                "target": "float32",
                "source": dtype,
                "times": times,
                "gb_per_s": rate,
                "in_place_gb_per_s": copy,
            }
        )
        show(rows[-1])
    return rows


def memory():
    """Peak memory above the start and time, by rows; each case in a fresh process."""
    rows = []
    for name, sizes in (("selfsup_kernels", (4096, 8192, 16384, 32768)), ("eager", (2048, 4096, 8192))):
        for m in sizes:
            out = subprocess.run(
                [sys.executable, __file__, "--one", name, str(m)], capture_output=True, text=True, check=True
            )
            rows.append({"name": name, "rows": m, "dim": 128, **json.loads(out.stdout)})
            show(rows[-1])
    return rows


def one_case(name, rows):
    """In its own process: the highest resident memory that one forward and backward adds to the inputs."""
    function = w.INFO_NCE[name]
    w.both(function, w.info_nce_inputs(64, 128))  # threads, libraries and code are loaded
    inputs = w.info_nce_inputs(rows // 2, 128)
    embeddings = inputs[0].numel() * 4
    before = memory_status("VmRSS")
    start = time.perf_counter()
    w.both(function, inputs)
    seconds = time.perf_counter() - start
    peak = memory_status("VmHWM")
    print(
        json.dumps(
            {
                "ms": 1e3 * seconds,
                "embedding_bytes": embeddings,
                "peak_bytes_above_inputs": peak - before,
                "ratio": (peak - before) / embeddings,
            }
        )
    )


def memory_status(field):
    """Resident bytes now (VmRSS) or at their highest since the process started (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def show(row):
    times = row.get("times")
    facts = {k: (f"{v:.3g}" if isinstance(v, float) else v) for k, v in row.items() if k != "times"}
    line = ", ".join(f"{k} {v}" for k, v in facts.items())
    if times:
        ours = times["selfsup_kernels"]["p50_ms"]
        parts = [f"{n} {t['p50_ms']:.2f} ms ({t['p50_ms'] / ours:.2f}x)" for n, t in times.items()]
        line += " | " + ", ".join(parts)
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one_case(args.one[0], int(args.one[1]))
    facts = header()
    slug = "".join(c if c.isalnum() else "-" for c in facts["device"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}-{facts['threads']}-threads"
    print(facts)
    for name, measure in (
        ("info_nce", lambda: info_nce(args.rounds)),
        ("byol", lambda: byol(args.rounds)),
        ("ema", lambda: ema(args.rounds)),
        ("memory", memory),
    ):
        timing.write(out, name, facts, measure())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
