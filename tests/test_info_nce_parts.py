"""Test the ops of a group and the tables that it exchanges, in one process: each call computes its own samples."""

import pytest
import torch
from helpers import randn, random_labels
from parts import compare_parts

from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

pytestmark = pytest.mark.sanitize

SIZES = [(23, 1, 40), (140, 113), (310,)]  # small tiles, blocks of several views, one process


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(impl, objective, sizes, dtype):
    queue = randn(9, 16, dtype=dtype, seed=1) if sizes == SIZES[0] else None
    compare_parts(impl, randn(3, sum(sizes), 16, dtype=dtype), sizes, objective, queue=queue)


@pytest.mark.parametrize("core", [0, 2])
def test_core_view(impl, core):
    compare_parts(impl, randn(3, 64, 8, dtype=torch.float64), SIZES[0], "supcon_out", core=core)


@pytest.mark.parametrize("classes", [1, 3, 10**6])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_labels(impl, objective, classes, dtype):
    """Labels are right with one class, with a few classes across processes, and with one class per sample."""
    sizes = (140, 3, 90)
    labels = random_labels(sum(sizes), classes)
    queue = randn(9, 16, dtype=dtype, seed=1) if classes == 1 else None
    compare_parts(impl, randn(2, sum(sizes), 16, dtype=dtype), sizes, objective, labels=labels, queue=queue)


def test_classes_of_one_process_each(impl):
    labels = torch.tensor([0] * 30 + [1] * 5 + [2] * 2 + [3])
    compare_parts(impl, randn(2, 38, 8, dtype=torch.float64), (30, 5, 2, 1), "supcon_out", labels=labels)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sums_that_underflow(impl, objective):
    """Rows that are recomputed with a running maximum also contribute to the rows of other processes."""
    views = torch.nn.functional.normalize(randn(2, 60, 32), dim=-1)
    views[:, 30:] *= -1
    compare_parts(impl, views, (17, 43), objective, temperature=0.004)


def test_rows_that_are_not_normalised(impl):
    compare_parts(impl, 3 * randn(2, 60, 8), (17, 43), "supcon_out", temperature=0.5, normalize=False)
