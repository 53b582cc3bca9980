"""What one process of a group is sent, holds and computes for an InfoNCE loss over many: counts, from the code, and
times, from rates that have to be given. `docs/scaling.md` states the same; ``scaling.py`` compares it with runs.

M = V B rows in all, m = M / W of them on each of W processes, D features. The objectives that tell views apart, float32
or bfloat16, no queue.
"""

from typing import NamedTuple

HEADER_BYTES = 19 * 8


class Work(NamedTuple):
    """One process's share of one forward and backward."""

    received_bytes: int
    """By the all-gathers and the all-reduce: what the other processes sent."""
    peak_bytes: int
    """At most held at a time, above the process's own embeddings."""
    products: float
    """Operations of the matrix products (a multiplication and an addition are two)."""


def received_bytes(processes, longest, dim, views, element, table_element, table_columns, labels=False):
    """The others' headers, rows, labels, losses and tables. ``longest``: rows of the process that has most, all views;
    every process sends as many."""
    a_row = dim * element + table_columns * table_element
    return (processes - 1) * (HEADER_BYTES + 8 + longest * a_row + (8 * longest // views if labels else 0))


def cpu(processes, rows, dim, views) -> Work:
    """float32 on the CPU. Tables are float64: a column of logw and of coef for each view, and the upstream gradient."""
    columns = 2 * views + 1
    # In the forward first the rows as they come and in their order, then in their order and normalised; in the
    # backward normalised and their gradient. Tables: N and its copy, logw, coef and the losses; then those sent,
    # those received in parts, and joined.
    wide = 2 * rows * dim * 4
    forward = wide + 8 * rows * (3 * views + 1)
    backward = wide + 8 * rows * (2 * views + 2 * columns + 2 * views) + rows * (8 + 4 * views)
    own = rows / processes
    return Work(
        received_bytes(processes, rows // processes, dim, views, 4, 8, columns),
        int(max(forward, backward) + own * dim * 4),
        # Pairs of own rows are computed once for both; scores are computed again in the backward.
        dim * (6 * own * rows - 2 * own * own),
    )


SPLIT_ROWS = 2 * 132 * 64
"""Where a process has few rows, their columns go to several blocks of threads, each with sums of its own: two blocks of
64 rows for each of an H200's 132 multiprocessors."""


def gpu(processes, rows, dim, views, element=2) -> Work:
    """The GPU kernels. Tables are float32: fast and slow weights and coef of each view, three numbers of the whole
    process, the upstream gradient. One process alone computes each score once for both rows in the forward."""
    columns = 3 * views + 4
    own = rows / processes
    stored = rows * dim * element
    # First the rows as they come and in their order, then in their order and normalised; in the backward normalised.
    forward = 2 * stored + 4 * rows * (4 * views + 1)
    partial = max(own, SPLIT_ROWS) * dim * 4
    backward = stored + partial + 4 * rows * (3 * views + 1 + 2 * columns + 3 * views)
    return Work(
        received_bytes(processes, rows // processes, dim, views, element, 4, columns),
        int(max(forward, backward) + own * dim * element),
        dim * (6 * own * rows - (rows * rows if processes == 1 else 0)),
    )


def seconds(work: Work, processes: int, products, inside, outside, per_machine=8) -> tuple[float, float]:
    """(computing, communicating), one after the other, from rates per second: operations, and bytes inside a machine of
    ``per_machine`` processes and outside. A ring through all processes runs at its slowest link."""
    return work.products / products, work.received_bytes / (inside if processes <= per_machine else outside)
