"""The named tuples that kernels take and pass on.

Pointers come in a tuple (:class:`selfsup_kernels.info_nce.call.Saved`), and so do the constants that a kernel is
compiled for. Numbers come one by one (``*layout.sizes``), and the kernel makes a tuple of them: Triton specializes the
numbers of a tuple argument on 1 and on multiples of 16 whatever ``do_not_specialize`` says, so that batches of 1, 64
and 65 samples would compile three kernels.

The fields of a constant are plain numbers in a kernel. A shape or a bound of ``tl.static_range`` needs a named
constant: ``BLOCK_M: tl.constexpr = tile.BLOCK_M``.
"""

from typing import Any, NamedTuple

from selfsup_kernels.info_nce.call import Call, Saved

Pointer = Any
"""A tensor for the launcher, a pointer to its first element for the kernel."""


class Sizes(NamedTuple):
    """The rows of a call: those of each view are stored one view after the other, then the queue's."""

    rows: int
    """M, the stored rows of the views, padding included: the length of a column of every table."""
    batch: int
    """Rows of one view, without padding (with labels of all views)."""
    padded: int
    """Stored rows of one view."""
    queue: int
    """K, without padding."""
    views: int
    """V; 1 with labels. The queue is view V."""
    core_view: int
    """Negative: none."""
    columns: int
    """:class:`selfsup_kernels.info_nce.objectives.Columns`."""


class Classes(NamedTuple):
    """The two rows of ``Saved.classes``, each (M,) int32. If ``crossed`` each sample's, as places in the order of the
    classes: what rows would be with one view."""

    first: Pointer
    """The first row of each row's class."""
    end: Pointer
    """The row after its last."""


class SampleIds(NamedTuple):
    """The user's ids. Both fields of a tuple are specialized, but nearly all ids are aligned and of stride 1."""

    data: Pointer
    """(B,), integers of any dtype."""
    stride: int


class Rules(NamedTuple):
    """Which pairs count, and for what; the fields are those of :class:`selfsup_kernels.info_nce.call.Call`."""

    columns: int
    inside: int
    numerator: int
    labelled: bool
    crossed: bool
    normalize: bool


class Tile(NamedTuple):
    """A kernel's tiles of pairs, and how they are computed."""

    BLOCK_M: int
    """Rows."""
    BLOCK_N: int
    """Columns."""
    BLOCK_K: int
    """Numbers of a row that are loaded at a time."""
    SPAN_M: int
    """BLOCK_M of the launch without masks, a multiple of this one's, so that both launches split the work at the same
    rows."""
    SPAN_N: int
    """Likewise BLOCK_N."""
    RESIDENT: bool
    """Rows are as wide as BLOCK_K, so that blocks of them stay loaded."""
    DESCRIPTOR: bool
    """Rows are loaded through tensor descriptors (TMA), not pointers."""
    PRECISION: str
    """``input_precision`` of ``tl.dot``."""
    FACTOR: float
    """The factor of tiles of the gradient (:func:`selfsup_kernels.tiles.layout.half_factor`)."""


class RowTile(NamedTuple):
    """The blocks of rows of the kernels that have no table of configurations."""

    BLOCK: int
    """Rows of a program."""
    BLOCK_K: int
    """Numbers of a row that are loaded at a time."""
    PRECISION: str | None = None
    """``input_precision`` of ``tl.dot``."""


class Source(NamedTuple):
    """The user's rows that a launch loads: those of the views, or of the queue."""

    padded: int
    """Stored rows of one view, or of the queue."""
    samples: int
    """B, or K."""
    rows: int
    """Stored rows, padding included."""
    first_row: int
    """The first of them."""
    columns: int
    """C, or 0 for the rows of the queue."""
    is_tensor: int
    """1: the temperature is a tensor, else 0."""


class Finish(NamedTuple):
    """The rows whose gradient a launch finishes, and where their sums lie."""

    padded: int
    """Stored rows of one view."""
    samples: int
    """B."""
    rows: int
    """M."""
    splits: int
    """Slots of ``partial`` that hold pairs of the batch."""
    first: int
    """The first sample of this process."""
    own: int
    part_first: int
    """The first row of each view that ``partial`` has."""
    part_rows: int
    views: int
    """V."""
    queues: int
    """Slots of ``partial`` that hold pairs with the queue, after the others."""


class SiglipWave(NamedTuple):
    """A block of pairs of the sigmoid loss."""

    rows: int
    """N, the rows of x."""
    columns: int
    """M, the rows of y."""
    first: int
    """Row i of x and row first + i of y are a positive pair."""
    x_first: int
    """The first row of the block, and the first column."""
    y_first: int


class PairedRows(NamedTuple):
    """The rows of one side of the sigmoid loss, and the positive pairs."""

    rows: int
    padded: int
    """Stored rows."""
    others: int
    """Rows of the other side."""
    shift: int
    """Row i and the other side's row i + shift are a positive pair, where there is such a row."""


class SumsWork(NamedTuple):
    """The division of the tiles among the programs of one launch."""

    items: int
    chunk: int
    """Blocks that stream past one block that stays, in one item."""
    first_block: int
    """The first block of this process's rows in each view."""
    own_blocks: int
    """The number of its blocks in each view."""


class GradientWork(NamedTuple):
    """One launch's part of the sums, and where it writes them."""

    shares: int
    """The number of programs that share the columns of a block of rows."""
    slot: int
    """The first slot of ``partial`` for pairs of the batch."""
    queue_slot: int
    """The slot for pairs with the queue."""
    first_block: int
    """The first block of this process's rows in each view."""
    own_blocks: int
    """The number of its blocks in each view."""
    part_first: int
    """The first row of each view that ``partial`` has."""
    part_rows: int
    begin: int
    """The first block of each view that a launch visits, counted in visiting order, and the one after the last."""
    end: int


class Scale(NamedTuple):
    """Made in a kernel: what turns inner products into scores, and these into exponentials."""

    factor: float
    """1 / temperature."""
    reference: float
    """Subtracted from a score before the exponential."""


class Block(NamedTuple):
    """Made in a kernel: a block of rows."""

    view: int
    """V: the queue."""
    local: int
    """Its first row, counted within the view."""
    row: int
    """Its first row, counted among the stored rows."""


def given(saved: Saved, call: Call) -> Saved:
    """Return ``saved`` as kernels take it: None for the classes without labels, and for logq if there is none."""
    classes = Classes(*saved.classes) if call.labelled else None
    return saved._replace(classes=classes, logq=saved.logq if saved.logq.numel() else None)


NOTHING = Saved(*[None] * len(Saved._fields))


def only(saved: Saved, *names: str) -> Saved:
    """Return ``saved`` with only these fields, the others None: each pointer makes a launch a microsecond longer."""
    return NOTHING._replace(**{name: getattr(saved, name) for name in names})
