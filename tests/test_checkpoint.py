"""Files that an earlier version wrote still load.

``data/checkpoint_3dd545e.pt`` was written at commit 3dd545e: ``state_dict`` and pickle of an ``EMA`` of
``Sequential(Linear(4, 3), BatchNorm1d(3))`` after three updates, and of a ``BYOLContrast``.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import selfsup_kernels as sk


@pytest.fixture(scope="module")
def saved():
    return torch.load(Path(__file__).parent / "data" / "checkpoint_3dd545e.pt", weights_only=False)


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():  # the shape of a learnable temperature was () then, and is (1,) now
        assert torch.equal(ours[name], value.view_as(ours[name]))


def test_state_of_an_average(saved):
    ema = sk.EMA(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 0.75)
    ema.load_state_dict(saved["ema"])
    assert_same(ema.state_dict(), saved["ema"])
    assert_same(ema.module.state_dict(), saved["average"])
    assert torch.equal(ema.module.eval()(saved["input"]), saved["output"])


def test_a_pickled_average(saved):
    ema = saved["ema_whole"]
    assert type(ema) is sk.EMA
    assert_same(ema.state_dict(), saved["ema"])
    assert torch.equal(ema.module.eval()(saved["input"]), saved["output"])


def test_state_and_pickle_of_a_method(saved):
    method = sk.methods.BYOLContrast(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3), learnable_temperature=True)
    method.load_state_dict(saved["method"])
    whole = saved["method_whole"]
    assert_same(method.state_dict(), whole.state_dict())
    views = saved["input"][None].expand(2, -1, -1)
    assert torch.equal(method(*views), whole(*views))
    assert sk.InfoNCELoss(learnable_temperature=True).load_state_dict(saved["loss"])
