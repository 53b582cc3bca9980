"""Run the comparisons of `tests/test_info_nce_parts.py` with the GPU kernels."""

import math

import pytest
import torch
from guard import guarded
from helpers import randn, random_labels
from parts import compare_parts

from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.tiles import launcher

IMPL = "triton"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(impl, path, device, dtype, objective):
    sizes = (23, 1, 40)
    queue = randn(9, 20, dtype=dtype, seed=1).to(device) if objective in ("supcon_out", "cross_view") else None
    compare_parts(impl, randn(2, sum(sizes), 20, dtype=dtype).to(device), sizes, objective, queue=queue)


def test_core_view(impl, path, device, dtype):
    compare_parts(impl, randn(3, 64, 20, dtype=dtype).to(device), (23, 1, 40), "supcon_out", core=1)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_labels(impl, path, device, dtype, objective, classes):
    labels = random_labels(45, classes).to(device)
    queue = randn(10, 20, dtype=dtype, seed=1).to(device) if classes == 1 else None
    views = randn(2, 45, 20, dtype=dtype).to(device)
    compare_parts(impl, views, (12, 33), objective, labels=labels, queue=queue)


def test_weights_out_of_range(impl, path, device):
    """If one process's weights leave the fast path's range, all processes take the slow path."""
    views = torch.nn.functional.normalize(randn(2, 60, 20), dim=-1)
    views[:, 30:] *= -1
    compare_parts(impl, views.to(device), (17, 43), "supcon_out", temperature=0.004)


def test_rows_that_are_not_normalised(impl, path, device):
    compare_parts(impl, (3 * randn(2, 60, 8)).to(device), (17, 43), "supcon_out", temperature=0.5, normalize=False)


@pytest.mark.parametrize("path", ["all"], indirect=True)
def test_nothing_past_an_end_is_read_where_sums_are_done_again(impl, path, device, monkeypatch):
    """Recomputing underflowed sums reads nothing past the end: a process owns the last rows of a full store."""
    if device.type != "cpu":
        pytest.skip("pages that cannot be touched are the CPU's")

    def fenced(shape, dtype, device):
        return guarded(torch.full(shape if isinstance(shape, tuple) else (shape,), math.nan).to(dtype))

    monkeypatch.setattr(launcher, "empty", fenced)
    views = torch.nn.functional.normalize(randn(2, 256, 16), dim=-1)
    views[:, :128], views[:, 128:250] = views[:1, :1], -views[:1, :1]
    compare_parts(impl, views, (250, 6), "supcon_out", temperature=0.003)


@pytest.mark.parametrize("path", ["waves"], indirect=True)
def test_a_part_that_begins_past_the_padding(impl, path, device):
    """A part may begin after the first 256 rows; rows are stored in multiples of 256."""
    compare_parts(impl, randn(2, 310, 16).to(device), (290, 20), "cross_view")
