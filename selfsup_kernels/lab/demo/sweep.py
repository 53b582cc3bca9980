"""Time and peak memory of the contrastive loss alone, eager against ours, over the batch size.

Memory is measured in a fresh process for each case. Cases that do not fit into the machine's memory or into the time
are left out, and said to be.
"""

import time

import torch
from torch.utils.benchmark import Timer

import selfsup_kernels as sk
from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.bench import eager

VIEWS, DIM, TEMPERATURE = 4, 128, 0.1
SIZES, QUICK_SIZES = (256, 512, 1024, 2048, 4096), (64, 128)
LOSSES = {
    "eager": lambda views: eager.info_nce_loss(views, TEMPERATURE),
    "ours": lambda views: sk.info_nce_loss(views, temperature=TEMPERATURE),
}
MATRICES = 5
"""M x M float32 matrices that the eager loss may hold at its peak."""


def run(sizes, budget, progress=lambda text: None) -> list[dict]:
    """One row per batch size: seconds, peak bytes, and why a loss was left out. ``budget``: seconds, about."""
    begin, rows = time.monotonic(), []
    for batch in sizes:
        row = {"batch": batch, "rows": batch * VIEWS, "seconds": {}, "peak_bytes": {}, "left_out": {}}
        for name in LOSSES:
            # Four times the work for twice the rows: for the memory, to warm up, and to measure.
            expected = 4 * 5 * rows[-1]["seconds"].get(name, 0.0) if rows else 0.0
            if name == "eager" and MATRICES * 4 * row["rows"] ** 2 > 0.6 * host_memory.available():
                row["left_out"][name] = "memory"
            elif time.monotonic() - begin + expected > budget:
                row["left_out"][name] = "time"
            else:
                progress(f"batch {batch}: {name}")
                row["peak_bytes"][name] = fresh.call("selfsup_kernels.lab.demo.sweep:peak_bytes", name, batch)
                row["seconds"][name] = seconds(name, batch)
        rows.append(row)
    return rows


def make_views(batch):
    return torch.randn(VIEWS, batch, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()


def seconds(name, batch) -> float:
    """Median of forward plus backward."""
    values = {"loss": LOSSES[name], "views": make_views(batch)}
    timer = Timer("loss(views).backward(); views.grad = None", globals=values, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def peak_bytes(name, batch) -> int | None:
    """Peak memory of one forward plus backward above the embeddings. Call it in a fresh process."""
    views = make_views(batch)
    LOSSES[name](make_views(16)).backward()  # libraries and threads are there before the measurement begins
    return host_memory.peak_growth(lambda: LOSSES[name](views).backward())
