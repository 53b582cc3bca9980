"""The places of a call's rows in GPU memory."""

import torch

from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.tiles.arguments import Rules, Sizes

PADDING = 256
"""The rows of each view are padded with zeros to a multiple of this, so that no tile needs a mask to load or reaches
into the next view."""


WIDTHS = (16, 32, 64, 128, 256)
"""Stored rows have one of these widths, which the table of configurations has an entry for each of; longer ones, which
are "long" there, pass through shared memory in pieces."""


class Layout:
    """The places of a call's rows. With labels all views form one, sorted by class, and ``views`` is 1."""

    def __init__(self, call: Call):
        self.call = call

    @property
    def partial(self):
        """True if tables and gradient are computed for a part of the rows. With labels a process computes all of them:
        its rows are spread over the classes."""
        return self.call.own < self.call.batch and not self.call.labelled

    def own_rows(self):
        """Return (first, end) of this process's rows within each view."""
        return (self.call.first, self.call.first + self.call.own) if self.partial else (0, self.batch)

    def own_blocks(self, size):
        """Return (first, count) of the blocks of ``size`` rows that hold rows of this process."""
        first, end = self.own_rows()
        return first // size, round_up(end, size) // size - first // size

    @property
    def part(self):
        """(first, count) of the rows of a view in ``partial``: those of this process, padded."""
        if not self.partial:
            return 0, self.padded
        first, count = self.own_blocks(PADDING)
        return first * PADDING, count * PADDING

    @property
    def views(self):
        return 1 if self.call.labelled else self.call.num_views

    @property
    def batch(self):
        """Rows of one view."""
        return self.call.batch * self.call.num_views if self.call.labelled else self.call.batch

    @property
    def padded(self):
        return round_up(self.batch, PADDING)

    @property
    def rows(self):
        """Stored rows without the queue's, padding included: the length of a column of every table."""
        return self.views * self.padded

    @property
    def queue_padded(self):
        return round_up(self.call.queue_rows, PADDING)

    @property
    def stored_rows(self):
        return self.rows + self.queue_padded

    @property
    def stride(self):
        """S, the numbers from one stored row to the next: the least width of the table of configurations that holds a
        row, or for longer rows a multiple of 64, so that tiles need no masks and few widths have kernels of their own.
        """
        return next((width for width in WIDTHS if self.call.dim <= width), round_up(self.call.dim, 64))

    @property
    def sizes(self):
        call = self.call
        return Sizes(self.rows, self.batch, self.padded, call.queue_rows, self.views, call.core_view, call.columns)

    @property
    def rules(self):
        call = self.call
        return Rules(call.columns, call.inside, call.numerator, call.labelled, call.crossed, call.normalize)

    @property
    def pair_rules(self):
        """The rules that kernels of pairs are compiled for: None for those that they do not depend on."""
        if self.call.labelled:
            return self.rules._replace(columns=None)
        return self.rules._replace(columns=None, inside=None, numerator=None)


def round_up(x, multiple):
    return -(-x // multiple) * multiple


def takes_tf32(dtype):
    """Return whether PyTorch's settings allow TF32 in float32 products. (``set_float32_matmul_precision`` writes this
    setting too, but its getter raises after the newer one was used.)"""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def half_factor(dtype):
    """Return the factor of tiles of G in float16. |G| is at most 2 relative to the largest upstream
    gradient, so nothing overflows, and values down to 4e-12 survive. bfloat16 has the range of float32 and needs no
    factor."""
    return 16384.0 if dtype == torch.float16 else 1.0


def check_size(impl, layout):
    columns = max(layout.call.columns_of_tables, layout.call.positives_of_tables)
    if columns * layout.rows >= 2**31 or layout.stored_rows >= 2**31:
        raise RuntimeError(
            f"impl={impl!r} takes fewer than 2^31 pairs of a row and a view, got {columns} x {layout.rows};"
            " use impl='reference'"
        )
