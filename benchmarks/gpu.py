"""Measure times, memory and errors of the operations on one GPU, against the alternatives; results as data.

    python benchmarks/gpu.py --out FOLDER [--quick] [--minutes N] [--skip NAME ...]

A list of cases for the engine of ``python -m selfsup_kernels bench``, the rows that matter most first, within a limit
of time. Writes ``FOLDER/OPERATION.json`` after every case, and a table at the end. A baseline that is not
installed, runs out of memory or fails is listed under ``unavailable`` with the reason, and hides nothing.

``--device cpu`` runs the same code on a CPU, to see that all of it works; its times mean nothing.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import torch

from selfsup_kernels.lab import pages
from selfsup_kernels.lab.bench import baselines, results, tables
from selfsup_kernels.lab.bench.suite import Suite
from selfsup_kernels.lab.bench.workloads import case

HALF, FULL = "bfloat16", "float32"
# (rows, dim, dtype). The most important first.
INFO_NCE = [(16384, 256, HALF), (16384, 128, HALF), (16384, 512, HALF)]
INFO_NCE += [(16384, 1024, HALF), (65536, 256, HALF), (16384, 256, FULL)]
INFO_NCE += [(8192, dim, HALF) for dim in (128, 256, 512, 1024)] + [(65536, dim, HALF) for dim in (128, 512, 1024)]
INFO_NCE += [(16384, dim, FULL) for dim in (128, 512, 1024)] + [(262144, 256, HALF), (65536, 256, FULL)]
INFO_NCE += [(262144, 128, HALF), (1048576, 128, HALF), (1048576, 256, HALF)]
SIGLIP = [(65536, 768, HALF), (16384, 512, HALF), (4096, 512, HALF)]  # (batch, dim, dtype)

BYOL = [(262144, FULL), (262144, HALF), (4096, FULL), (32768, FULL), (4096, HALF), (32768, HALF)]
EMA = [("ResNet-50", FULL), ("ResNet-50", HALF), ("ViT-B", FULL), ("ViT-B", HALF)]
COMPILED = [(4096, 512, HALF), (16384, 256, HALF), (16384, 256, FULL), (262144, FULL), ("ResNet-50", FULL)]
"""Those of which torch.compile is measured too: it takes half a minute."""


def cases(quick, tiny):
    """Yield (case, whether torch.compile is measured): the most important first."""
    if tiny:
        yield from ((case("info_nce", views=2, batch=32, dim=16, dtype=d), True) for d in (FULL, HALF))
        yield case("siglip", batch=32, dim=16), True
        yield case("byol", views=1, batch=48, dim=16), True
        yield from ((case("ema", model="tiny", dtype=d), True) for d in (FULL, HALF))
        return
    info_nce = [
        (case("info_nce", views=2, batch=rows // 2, dim=dim, dtype=dtype), (rows, dim, dtype) in COMPILED)
        for rows, dim, dtype in INFO_NCE
    ]
    yield from info_nce[:6]
    for batch, dim, dtype in SIGLIP[: 1 if quick else None]:
        yield case("siglip", batch=batch, dim=dim, dtype=dtype), (batch, dim, dtype) in COMPILED
    for batch, dtype in BYOL[: 3 if quick else None]:
        yield case("byol", views=1, batch=batch, dim=256, dtype=dtype), (batch, dtype) in COMPILED
    for model, dtype in EMA[: 2 if quick else None]:
        yield case("ema", model=model, dtype=dtype), (model, dtype) in COMPILED
    yield from [] if quick else info_nce[6:]


def columns(made, compiled):
    """Return ours and every baseline; torch.compile where it is wanted."""
    # pytorch-metric-learning's loss over all triplets takes minutes and most of the memory.
    left_out = {"pytorch-metric-learning NTXentLoss", *([] if compiled else ["compile"])}
    return [baselines.OURS, *(name for name in baselines.BASELINES[made.op] if name not in left_out)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the most important rows alone; tiny ones on a CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no new measurement after this time")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="baselines to leave out, such as compile")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and this PyTorch sees none.", file=sys.stderr)
        return 2
    tiny = args.quick and args.device == "cpu"
    suite = Suite(
        args.device,
        dtypes=(HALF, FULL),
        seconds=0.2 if tiny else 3.0,
        target_ms=20 if args.quick else 200,
        minutes=args.minutes,
        skip=args.skip,
        graphs=True,
        rates={"size": 256, "copied": 2**22} if tiny else None,
    )
    for made, compiled in cases(args.quick, tiny):
        start = time.monotonic()
        suite.measure(made, columns(made, compiled))
        suite.rate()
        rows = [row for row in suite.rows if row["op"] == made.op]
        results.write_json(args.out / f"{made.op}.json", suite.header, rows)
        print(f"{made.label}: {time.monotonic() - start:.1f} s", flush=True)
    tables.show(pages.console(150), suite.header, suite.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
