"""Measure a loss over the batch of many processes (gloo, on this machine), and compare what is sent with a formula.

    python benchmarks/scaling.py [--samples 8192] [--processes 1 2 4 8] [--out DIR]

Each process counts the bytes that it is sent, its highest resident memory, and its CPU time (not the time that passes:
more processes than cores wait for each other). The loss and the gradient are compared with those of one process.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import tables
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import selfsup_kernels as sk
from selfsup_kernels.core import processes as groups
from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.bench import results, timing

VIEWS = 2

# Large blocks of memory go back to the system when they are freed, or the highest resident memory would be luck. The
# processes read it when they start.
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)


def received_bytes(processes, longest, dim, views, element, table_element, table_columns, labels=False):
    """Return the bytes of what others send, as docs/scaling.md lists them; ``longest``: the most rows of a process."""
    a_row = dim * element + table_columns * table_element
    return (processes - 1) * (21 * 8 + 8 + longest * a_row + (8 * longest // views if labels else 0))


def measure(processes, args):
    """Return the largest numbers of what the processes of one group report, as a row of results."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (processes, folder, args), nprocs=processes)
        reports = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    rows = VIEWS * args.samples
    views = inputs(args).requires_grad_()
    loss = sk.info_nce_loss(views)
    loss.backward()
    gradient = torch.cat([r["gradient"] for r in reports], 1) / processes
    return {
        "processes": processes,
        "rows": rows,
        "dim": args.dim,
        "received_bytes": max(r["received"] for r in reports),
        # float32 rows; log_weights and positives of each view and the upstream gradient, in float64
        "model_received_bytes": received_bytes(processes, rows // processes, args.dim, VIEWS, 4, 8, 2 * VIEWS + 1),
        "peak_bytes": max(r["peak"] for r in reports),
        "processor_ms": 1e3 * max(r["seconds"] for r in reports),
        "loss_error": max(abs(r["loss"] - loss.item()) for r in reports),
        "gradient_error": ((gradient - views.grad).norm() / views.grad.norm()).item(),
    }


def inputs(args):
    return torch.randn(VIEWS, args.samples, args.dim, generator=torch.Generator().manual_seed(0))


def process(rank, processes, folder, args):
    """Measure one process of a group, and write its report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)

    def step(views):
        views = views.detach().requires_grad_()
        loss = sk.info_nce_loss(views, group=dist.group.WORLD)
        loss.backward()
        return {"loss": loss.item(), "gradient": views.grad}

    step(torch.randn(VIEWS, 64, args.dim))  # libraries, threads and code are loaded
    own = inputs(args).tensor_split(processes, 1)[rank].clone()
    dist.barrier()
    report, times = {}, []
    with counted() as received:
        report["peak"] = host_memory.peak_growth(lambda: report.update(step(own)))
    for _ in range(args.repeats):
        start = time.process_time()
        step(own)
        times.append(time.process_time() - start)
    report |= {"received": sum(received), "seconds": statistics.median_high(times)}
    torch.save(report, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def counted():
    """Yield a list that fills with the bytes that this process is sent by each collective."""
    received = []
    gather, reduce = groups.all_gather, dist.all_reduce

    def all_gather(out, own, group):
        received.append(out.nbytes - own.nbytes)
        return gather(out, own, group)

    def all_reduce(x, group):
        received.append((dist.get_world_size(group) - 1) * x.nbytes)
        return reduce(x, group=group)

    with mock.patch.object(groups, "all_gather", all_gather), mock.patch.object(dist, "all_reduce", all_reduce):
        yield received


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8192, help="of the whole batch")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write scaling.json there")
    args = parser.parse_args()
    rows = [measure(n, args) for n in args.processes]
    print(*tables.scaling(rows), sep="\n")
    if args.out:
        results.write_json(args.out / "scaling.json", results.header(timing.Clock("cpu")) | {"threads": 1}, rows)
    return 1 if any(row["gradient_error"] > 1e-5 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
