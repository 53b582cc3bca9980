"""The tables that an InfoNCE forward leaves for its backward, sample by sample, whichever implementation made them: the
part that the processes of a group send each other."""

import torch

from selfsup_kernels._rows import PADDING, STATE_NORM, STATE_SCALE, STATE_SLOW


def own_rows(impl, saved, labelled, normalize, num_views, batch, first, count):
    """``(V, count, C)``: all that the other processes need of the tables of samples first .. first + count."""
    logw, coef, state, order = saved[2:6]
    if impl == "triton":
        columns = [_gpu_by_sample(t, order, labelled, num_views, batch) for t in (*logw, coef)]
        # What concerns all rows of a process goes along with each: no exchange of its own.
        whole = torch.stack([state[STATE_SLOW], _bound(state, normalize), state[STATE_SCALE]])
        whole = whole.expand(num_views, batch, 3)
        return torch.cat([*columns, whole], -1)[:, first : first + count]
    if impl == "cpu" and labelled:
        place = torch.argsort(order[:count])  # this process's samples come first, sorted by class
        return torch.cat([t.view(batch, num_views, -1)[place].transpose(0, 1) for t in (logw, coef)], -1)
    return torch.cat([t.view(num_views, batch, -1)[:, first : first + count] for t in (logw, coef)], -1)


def with_all_rows(impl, saved, labelled, normalize, rows):
    """``saved`` with the tables of all samples, ``rows`` (V, B, C) as the processes gathered them."""
    z, rnorm, logw, coef, state, order = saved
    if impl == "triton":
        width = logw.shape[1]
        parts = rows[..., : 2 * width + len(coef)].split([width, width, len(coef)], -1)
        fast, slow, coef = (_gpu_by_row(t, order, labelled) for t in parts)
        others = rows[..., -3:].reshape(-1, 3)
        # Weights are relative to a score reference; where a process had another one (un-normalised rows and queues
        # that differ), only the absolute ones will do.
        apart = (others[:, 1] != _bound(state, normalize)).any()
        state = state.clone()
        state[STATE_SLOW] = torch.maximum(others[:, 0].amax(), apart.to(state.dtype))
        # A temperature on the device was not compared when the call began; a mixed gradient must not look right.
        same = (others[:, 2] == state[STATE_SCALE]).all()
        state[STATE_SCALE] = torch.where(same, state[STATE_SCALE], torch.nan)
        return z, rnorm, torch.stack([fast, slow]), coef, state, order
    width = logw.shape[1]
    if impl == "cpu" and labelled:
        rows = rows[:, order].transpose(0, 1)
    logw, coef = (t.reshape(-1, t.shape[-1]).contiguous() for t in rows.split([width, coef.shape[1]], -1))
    return z, rnorm, logw, coef, state, order


def _bound(state, normalize):
    """What the score reference depends on besides the temperature: the longest row."""
    return state.new_zeros(()) if normalize else state[STATE_NORM]


def _gpu_by_sample(table, order, labelled, num_views, batch):
    """(C, stored rows) -> (V, B, C)."""
    if labelled:
        place = torch.argsort(order[:batch])
        return table[:, : num_views * batch].view(-1, batch, num_views)[:, place].permute(2, 1, 0)
    return table.view(len(table), num_views, -1)[..., :batch].permute(1, 2, 0)


def _gpu_by_row(rows, order, labelled):
    """(V, B, C) -> (C, stored rows), each view's padded with zeros."""
    _, batch, columns = rows.shape
    by_view = not labelled
    table = rows.permute(2, 0, 1) if by_view else rows[:, order[:batch]].permute(2, 1, 0).reshape(columns, 1, -1)
    return torch.nn.functional.pad(table, (0, -table.shape[2] % PADDING)).reshape(columns, -1).contiguous()
