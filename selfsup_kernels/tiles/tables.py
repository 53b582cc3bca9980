"""Launches that make losses and weights from the sums (:mod:`selfsup_kernels.tiles.kernels.tables`, and with labels
:mod:`selfsup_kernels.tiles.kernels.classes`)."""

import math

import torch

from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.tiles import launcher
from selfsup_kernels.tiles.arguments import Classes, RowTile, only


def loss_and_parts(layout, programs, device):
    """Return what kernels write the loss to, (V, own samples) or (), the programs' parts of its sum or None, and the
    factor of the sum, by the call's reduction."""
    call, reduction = layout.call, REDUCTIONS[layout.call.reduction]
    if reduction == "none":
        return launcher.empty((call.num_views, call.own), torch.float32, device), None, 1.0
    factor = 1 / (call.num_views * call.own) if reduction == "mean" else 1.0
    return launcher.empty((), torch.float32, device), launcher.empty(programs, torch.float64, device), factor


def view_tables(layout, saved, ids, sums, precision):
    """Write log_weights, weights and positives; return the loss of this process's anchors, by the call's reduction."""
    call = layout.call
    # If crossed, programs take anchors in the order of the classes, and leave out those of other processes.
    grid = launcher.cdiv(call.batch if call.crossed else call.own, TABLE_BLOCK), layout.views
    order = ("order", "classes") if call.crossed else ()
    loss, parts, factor = loss_and_parts(layout, math.prod(grid), saved.rows.device)
    launcher.launch(
        "view_tables_kernel",
        grid,
        sums,
        only(saved, "rows", "log_weights", "weights", "positives", "scalars", "logq", *order),
        ids,
        loss,
        parts,
        factor,
        *layout.sizes,
        call.first,
        call.own,
        layout.stride,
        WIDTH=launcher.next_power_of_2(max(2, call.columns_of_tables)),
        rules=layout.rules,
        tile=table_tile(layout, saved.rows.dtype, precision),
        num_warps=8,
        maxnreg=255,  # the compiler would spill registers to fit one more program on an SM
    )
    return loss


TABLE_BLOCK = 32
"""Anchors per program: few, so that a batch of a few hundred samples uses many SMs."""


def table_tile(layout, dtype, precision):
    """Fewer numbers of a row are loaded at a time in float32, whose exact products need more registers."""
    width = min(32 if dtype == torch.float32 else 64, max(16, launcher.next_power_of_2(layout.stride)))
    return RowTile(TABLE_BLOCK, width, precision)


def sort_by_class(layout, labels):
    """Return ``Saved.order`` and ``Saved.classes``, the samples sorted by label; if ``crossed`` the classes of samples,
    as :class:`selfsup_kernels.tiles.arguments.Classes` has it."""
    call = layout.call
    views, rows = (1, layout.padded) if call.crossed else (call.num_views, layout.rows)
    order = launcher.empty(call.batch, torch.int64, labels.device)
    classes = launcher.empty((2, rows), torch.int32, labels.device)
    launcher.launch(
        "sort_kernel",
        (launcher.cdiv(call.batch, SORT_BLOCK),),
        labels,
        order,
        Classes(*classes),
        labels.stride(0),
        call.batch,
        rows,
        views,
        BY_SAMPLE=call.crossed,
        BLOCK=SORT_BLOCK,
        STEP=SORT_STEP,
    )
    return order, classes


SORT_BLOCK, SORT_STEP = 32, 128


def class_tables(layout, saved, sums, precision):
    """Write log_weights, weights and positives; return the loss of this process's anchors, by the call's reduction."""
    call = layout.call
    programs = launcher.cdiv(layout.batch, TABLE_BLOCK)
    loss, parts, factor = loss_and_parts(layout, programs, saved.rows.device)
    launcher.launch(
        "class_tables_kernel",
        (programs,),
        sums,
        saved._replace(inverse_norms=None),
        loss,
        parts,
        factor,
        *layout.sizes,
        call.first,
        call.own,
        call.num_views,
        layout.stride,
        rules=layout.rules,
        tile=table_tile(layout, saved.rows.dtype, precision),
        num_warps=8,
    )
    return loss
