"""A loss over the batch of many processes (gloo, on this machine), beside what `scaling_model.py` says of it.

    python benchmarks/scaling.py [--samples 8192] [--processes 1 2 4 8] [--out DIR]

Each process counts the bytes that it is sent, its highest resident memory, and the processor time that it spends (not
the time that passes: more processes than processors wait for each other). The loss and the gradient are compared with
those of one process.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import rich
import rich.table
import scaling_model
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8192, help="of the whole batch")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write scaling.json there")
    args = parser.parse_args()
    rows = [measure(n, args) for n in args.processes]
    show(rows)
    if args.out:
        results.write(args.out, "scaling", results.header(timing.Clock("cpu")) | {"threads": 1}, rows)
    return 1 if any(row["gradient_error"] > 1e-5 for row in rows) else 0


def measure(processes, args):
    """What the processes of one group report, their largest numbers, beside the model's."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (processes, folder, args), nprocs=processes)
        reports = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    rows = VIEWS * args.samples
    model = scaling_model.cpu(processes, rows, args.dim, VIEWS)
    views = inputs(args).requires_grad_()
    loss = sk.info_nce_loss(views)
    loss.backward()
    gradient = torch.cat([r["gradient"] for r in reports], 1) / processes
    return {
        "processes": processes,
        "rows": rows,
        "dim": args.dim,
        "received_bytes": max(r["received"] for r in reports),
        "model_received_bytes": model.received_bytes,
        "peak_bytes": max(r["peak"] for r in reports),
        "model_peak_bytes": model.peak_bytes,
        "processor_ms": 1e3 * max(r["seconds"] for r in reports),
        "model_products": model.products,
        "loss_error": max(abs(r["loss"] - loss.item()) for r in reports),
        "gradient_error": ((gradient - views.grad).norm() / views.grad.norm()).item(),
    }


def inputs(args):
    return torch.randn(VIEWS, args.samples, args.dim, generator=torch.Generator().manual_seed(0))


def process(rank, processes, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    group = dist.group.WORLD

    def step(views):
        views = views.requires_grad_()
        loss = sk.info_nce_loss(views, group=group)
        loss.backward()
        return loss.item(), views.grad

    step(torch.randn(VIEWS, 64, args.dim))  # libraries, threads and code are loaded
    own = inputs(args).tensor_split(processes, 1)[rank].clone()
    dist.barrier()
    host_memory.reset_peak()  # counts from here on
    before = host_memory.status("VmRSS")
    with counted() as received:
        loss, gradient = step(own)
    peak = host_memory.status("VmHWM") - before
    report = {"received": sum(received), "peak": peak, "loss": loss, "gradient": gradient}
    times = []
    for _ in range(args.repeats):
        own.grad = None
        start = time.process_time()
        step(own.detach())
        times.append(time.process_time() - start)
    report["seconds"] = sorted(times)[len(times) // 2]
    torch.save(report, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def counted():
    """A list that fills with the bytes that this process is sent by each collective."""
    received = []
    gather, reduce = groups.all_gather, dist.all_reduce

    def all_gather(out, own, group):
        received.append(out.nbytes - own.nbytes)
        return gather(out, own, group)

    def all_reduce(x, group):
        received.append((dist.get_world_size(group) - 1) * x.nbytes)
        return reduce(x, group=group)

    groups.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield received
    finally:
        groups.all_gather, dist.all_reduce = gather, reduce


def show(rows):
    table = rich.table.Table(title=f"{rows[0]['rows']} rows, D = {rows[0]['dim']}: each process, measured / model")
    for name in ("processes", "received", "peak memory", "processor time", "of one process", "gradient error"):
        table.add_column(name, justify="right")
    alone = rows[0]
    for row in rows:
        share = row["processor_ms"] / alone["processor_ms"]
        table.add_row(
            str(row["processes"]),
            f"{row['received_bytes'] / 1e6:.2f} / {row['model_received_bytes'] / 1e6:.2f} MB",
            f"{row['peak_bytes'] / 1e6:.1f} / {row['model_peak_bytes'] / 1e6:.1f} MB",
            f"{row['processor_ms']:.0f} ms",
            f"{share:.2f} / {row['model_products'] / alone['model_products']:.2f}",
            f"{row['gradient_error']:.1e}",
        )
    rich.print(table)


if __name__ == "__main__":
    sys.exit(main())
