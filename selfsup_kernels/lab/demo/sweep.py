"""Measure time and peak memory of the contrastive loss alone, eager against ours, over the batch size.

Each case has a fresh process. One that does not fit into memory or into the time is left out, and the report says so.
"""

import subprocess

import torch
from torch.utils.benchmark import Timer

import selfsup_kernels as sk
from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.bench import eager

PATIENCE = 60
"""Seconds that a case may take."""
VIEWS, DIM, TEMPERATURE = 4, 128, 0.1
SIZES, QUICK_SIZES = (256, 512, 1024, 2048, 4096), (64, 128)
LOSSES = {
    "eager": lambda views: eager.info_nce_loss(views, TEMPERATURE),
    "ours": lambda views: sk.info_nce_loss(views, temperature=TEMPERATURE),
}


def run(sizes, progress=lambda text: None) -> list[dict]:
    """Return a row per batch size: seconds, peak bytes, and why a loss was left out."""
    rows = []
    for batch in sizes:
        row = {"batch": batch, "rows": batch * VIEWS, "seconds": {}, "peak_bytes": {}, "left_out": {}}
        for name in LOSSES:
            progress(f"batch {batch}: {name}")
            options = {"memory_limit": host_memory.available(), "timeout": PATIENCE}
            try:
                found = fresh.call("selfsup_kernels.lab.demo.sweep:measure", name, batch, **options)
                row["peak_bytes"][name], row["seconds"][name] = found
            except fresh.OutOfMemory:
                row["left_out"][name] = "memory"
            except subprocess.TimeoutExpired:
                row["left_out"][name] = "time"
        rows.append(row)
    return rows


def measure(name, batch) -> list:
    """Return peak bytes above the embeddings and median seconds of forward plus backward, in a fresh process."""
    views = torch.randn(VIEWS, batch, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = LOSSES[name]
    loss(torch.ones(VIEWS, 16, DIM, requires_grad=True)).backward()  # loads libraries and starts threads
    peak = host_memory.peak_growth(lambda: loss(views).backward())
    values = {"loss": loss, "views": views}
    timer = Timer("loss(views).backward(); views.grad = None", globals=values, num_threads=torch.get_num_threads())
    return [peak, timer.blocked_autorange(min_run_time=0.5).median]
