"""Measure what labels, duplicates and logq add to the time of the InfoNCE loss.

    python benchmarks/pairs.py [--batch N] [--dim D] [--device D] [--seconds S] [--out FOLDER]

Forward and backward of two views in float32. The calls of one objective take turns, and a ratio is that of the medians.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import tables
import torch

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import results, timing

OBJECTIVES = ("supcon_out", "cross_view")


def forms(batch, device):
    """Return ``{name: arguments of the call}``."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(count, (batch,), generator=generator).to(device)

    logq = torch.randn(batch, generator=generator).to(device)
    return {
        "plain": {},
        "duplicates, pairs": {"duplicates": ids(batch)},
        "duplicates, 20 ids": {"duplicates": ids(20)},
        "labels, pairs": {"labels": ids(batch)},
        "labels, 20 classes": {"labels": ids(20)},
        "logq": {"logq": logq},
        "duplicates and logq": {"duplicates": ids(batch), "logq": logq},
    }


def measure(objective, args):
    """Return a row of results for each form of the call."""
    views = torch.randn(2, args.batch, args.dim, generator=torch.Generator().manual_seed(1)).to(args.device)

    def work(arguments):
        return lambda leaf: sk.info_nce_loss(leaf, objective=objective, group="local", **arguments).backward()

    def leaf():
        return views.clone().requires_grad_()

    calls = {name: (leaf, work(arguments)) for name, arguments in forms(args.batch, args.device).items()}
    times = timing.in_turns(calls, args.seconds, clock=timing.Clock(args.device))
    plain = times["plain"]["p50_ms"]
    sizes = {"objective": objective, "batch": args.batch, "dim": args.dim, "dtype": "float32"}
    return [sizes | {"form": name, **found, "of_plain": found["p50_ms"] / plain} for name, found in times.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long the turns of one objective take")
    parser.add_argument("--out", type=Path, help="write pairs.json there")
    args = parser.parse_args()
    rows = [row for objective in OBJECTIVES for row in measure(objective, args)]
    print(*tables.pairs(rows), sep="\n")
    if args.out:
        results.write_json(args.out / "pairs.json", results.header(timing.Clock(args.device)), rows)


if __name__ == "__main__":
    main()
