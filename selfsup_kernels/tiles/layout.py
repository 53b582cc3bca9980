"""Where the rows of an InfoNCE call lie in a GPU's memory, and what the launchers prepare with PyTorch's operators."""

from typing import NamedTuple

import torch

PADDING = 256
"""Each view's rows are stored up to a multiple of this, the rest zeros: no tile of any configuration needs a mask to
be loaded, or reaches into the next view."""


STATE_SCALE, STATE_NORM, STATE_SLOW = 0, 1, 2
"""Places in the small float32 tensor that the kernels of one call hand on: 1 / temperature, the largest squared norm of
a row (where rows are not normalised), and whether a weight of the backward is out of the fast path's range."""


class Layout(NamedTuple):
    """Where the rows lie. With labels all views are one, sorted by class: then ``views`` is 1."""

    user_views: int
    samples: int
    dim: int
    queue: int
    labels: bool
    first: int = 0
    count: int = -1
    """The samples that are this process's own; a negative count: all."""

    @property
    def own(self):
        """This process's samples."""
        return self.samples if self.count < 0 else self.count

    @property
    def partial(self):
        """Whether tables and gradient are of some rows alone. With labels, where they are sorted by class, a process's
        rows lie among all others: it does the work of all."""
        return self.own < self.samples and not self.labels

    def own_rows(self):
        """(first, end) of this process's rows within each view."""
        return (self.first, self.first + self.own) if self.partial else (0, self.batch)

    def own_blocks(self, size):
        """(first, count) of the blocks of ``size`` rows that hold own rows of a view."""
        first, end = self.own_rows()
        return first // size, _round_up(end, size) // size - first // size

    @property
    def part(self):
        """(first, count) of the rows of a view for which the backward has memory: those of its own, padded."""
        if not self.partial:
            return 0, self.padded
        first, count = self.own_blocks(PADDING)
        return first * PADDING, count * PADDING

    @property
    def views(self):
        return 1 if self.labels else self.user_views

    @property
    def batch(self):
        """Rows of one view."""
        return self.samples * self.user_views if self.labels else self.samples

    @property
    def padded(self):
        return _round_up(self.batch, PADDING)

    @property
    def rows(self):
        """Stored rows without the queue's, padding included: the length of a column of every table."""
        return self.views * self.padded

    @property
    def queue_padded(self):
        return _round_up(self.queue, PADDING)

    @property
    def stored_rows(self):
        return self.rows + self.queue_padded

    @property
    def stride(self):
        """Numbers from one stored row to the next: a multiple of 16 bytes for every dtype, and of what a product
        takes."""
        return _round_up(self.dim, 16)

    @property
    def columns(self):
        """Columns of the tables: the views, and the queue."""
        return self.views + (self.queue > 0)


def _round_up(x, multiple):
    return -(-x // multiple) * multiple


def sort_by_class(labels, views):
    """(order of the samples, first row and end of each row's class), by rows = place in the order * views + view."""
    values, order = torch.sort(labels.to(torch.int64), stable=True)
    bounds = [
        (views * torch.searchsorted(values, values, right=right)).to(torch.int32).repeat_interleave(views)
        for right in (False, True)
    ]
    return order, *bounds


def takes_tf32(dtype):
    """Whether products of float32 numbers may lose all beyond TF32: as PyTorch's own, where one of its settings says so
    (`set_float32_matmul_precision` sets this too; to ask it raises once a newer setting was used)."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def half_factor(dtype):
    """float16 holds G, the gradient of pairs, times this: a pair's gradient is at most 2 of the largest upstream
    gradient, so nothing overflows, and what is 4e-12 of it is not lost yet (bfloat16 has float32's range)."""
    return 16384.0 if dtype == torch.float16 else 1.0


def upstream_of_rows(layout, grad, order):
    """One number per stored row, relative to the largest; and that, so that G has numbers of the size of probabilities
    whatever the loss is scaled by."""
    grad = grad.float()
    largest = grad.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    grad = grad / largest
    if layout.labels:
        grad = grad[:, order[: layout.samples]].T
    else:
        grad = torch.nn.functional.pad(grad, (0, layout.padded - layout.samples))
    return grad.reshape(-1).contiguous(), largest


def check_size(impl, layout):
    if max(layout.columns, 3) * layout.rows >= 2**31 or layout.stored_rows >= 2**31:
        raise RuntimeError(
            f"impl={impl!r} takes fewer than 2^31 pairs of a row and a view, got {layout.columns} x {layout.rows};"
            " use impl='reference'"
        )
