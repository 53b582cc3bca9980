"""Where the rows of an InfoNCE call lie in memory. Imports nothing, so that the ops' fakes can use it."""

from typing import NamedTuple

PADDING = 256
"""Each view's rows are stored up to a multiple of this, the rest zeros: no tile of any configuration needs a mask to
be loaded, or reaches into the next view."""


class Layout(NamedTuple):
    """Where the rows lie. With labels all views are one, sorted by class: then ``views`` is 1."""

    user_views: int
    samples: int
    dim: int
    queue: int
    labels: bool

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
