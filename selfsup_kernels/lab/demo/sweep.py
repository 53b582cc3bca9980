"""Time and peak memory of the contrastive loss alone, eager against ours, over the batch size.

Times: this process takes both losses in turns, forward and backward. Memory: a fresh process per case (``_fresh``).
Cases that do not fit into the machine's memory or into the time budget are left out, and said to be.
"""

import time
from statistics import median

import torch

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
"""M x M float32 matrices that the eager loss may hold at its peak; a case that would not fit is left out."""
ROUNDS = (3, 9)


def run(sizes, budget, progress=lambda text: None) -> list[dict]:
    """One row per batch size: seconds, peak bytes, and why a loss was left out. ``budget``: seconds, about."""
    begin = time.monotonic()
    rows, last = [], {}
    for batch in sizes:
        row = {"batch": batch, "rows": batch * VIEWS, "seconds": {}, "peak_bytes": {}, "left_out": {}}
        rows.append(row)
        for name in LOSSES:
            # Four times the work for twice the rows; once for the memory, once to warm up, then the rounds.
            expected = 4 * last.get(name, 0.0) * (2 + ROUNDS[0])
            if name == "eager" and MATRICES * 4 * row["rows"] ** 2 > 0.6 * host_memory.available():
                row["left_out"][name] = "memory"
            elif time.monotonic() - begin + expected > budget:
                row["left_out"][name] = "time"
            else:
                progress(f"batch {batch}: memory of {name}")
                row["peak_bytes"][name] = fresh.call("selfsup_kernels.lab.demo.sweep:peak_bytes", name, batch)
        progress(f"batch {batch}: time")
        row["seconds"] = measure([name for name in LOSSES if name not in row["left_out"]], batch)
        last = row["seconds"]
    return rows


def make_views(batch):
    return torch.randn(VIEWS, batch, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()


def measure(names, batch, enough=1.0) -> dict:
    """Median seconds of forward plus backward, the losses in turns."""
    views, seconds = make_views(batch), {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(1 + ROUNDS[1]):
        for name in names:
            views.grad = None
            start = time.perf_counter()
            LOSSES[name](views).backward()
            if turn:  # the first turn warms caches and allocators up
                seconds[name].append(time.perf_counter() - start)
        if turn >= ROUNDS[0] and time.perf_counter() - begin > enough:
            break
    return {name: median(values) for name, values in seconds.items()}


def peak_bytes(name, batch) -> int | None:
    """Peak memory of one forward plus backward above the embeddings. Call it in a fresh process."""
    views = make_views(batch)
    LOSSES[name](make_views(16)).backward()  # libraries and threads are there before the measurement begins
    return host_memory.peak_growth(lambda: LOSSES[name](views).backward())
