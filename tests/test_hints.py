"""Users of other packages' names and layouts get a hint in the error, or one warning per process."""

import warnings

import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import validate

Z0, Z1 = randn(6, 5), randn(6, 5, seed=1)
LABELS = torch.tensor([0, 1, 0, 2, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sk.info_nce_loss(Z0, Z1), TypeError, r"^views: .*\[z0, z1\].*got 2 positional arguments"),
        (lambda: sk.info_nce_loss([Z0, Z1], 0.1), TypeError, r"^views: .*by name, got 2 positional arguments"),
        (lambda: sk.info_nce_loss(torch.cat([Z0, Z1])), ValueError, r"^views: .*\(12, 5\); as two views: .*chunk\(2\)"),
        (lambda: sk.InfoNCELoss()(torch.cat([Z0, Z1])), ValueError, r"^views: .*chunk\(2\)"),
        (lambda: sk.info_nce_loss(Z0, labels=LABELS), ValueError, r"^views: .*\(6, 5\); as one view: \[views\]"),
        (lambda: sk.InfoNCELoss()(Z0, Z1, LABELS), ValueError, r"^views\[2\]: .*\(6,\); labels .* labels="),
        (
            lambda: sk.info_nce_loss([Z0[:1], Z1[:1]]),
            ValueError,
            "^views: expected at least 2 samples .*drop_last=True",
        ),
        (
            lambda: sk.info_nce_loss(torch.stack([Z0, Z1], 1), labels=LABELS),
            ValueError,
            r"^labels: expected shape \(2,\), one per sample, got \(6,\); views are \(V, B, D\), here 6 of 2 samples",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS.float()),
            TypeError,
            "^labels: expected a tensor of int64, int32, int16, int8, uint8, got float32$",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS.to_sparse()),
            TypeError,
            "^labels: expected a dense tensor, got layout torch.sparse_coo$",
        ),
    ],
)
def test_message_says_what_to_pass(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_misleading_hint():
    for views, hint in ((Z0[:5], "chunk"), ([Z0, Z1[0]], "labels")):
        with pytest.raises(ValueError, match=r"^views.*shape \(5") as raised:
            sk.info_nce_loss(views)
        assert hint not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("clip", ["cross_view"]),
        ("CLIPLoss", ["cross_view"]),
        ("nt_xent", ["supcon_out"]),
        ("NT-Xent", ["supcon_out"]),
        ("simclr", ["supcon_out"]),
        ("infonce", ["supcon_out", "cross_view"]),
        ("info_nce", ["supcon_out", "cross_view"]),
        ("supcon", ["supcon_out"]),
        ("DCL", ["decoupled"]),
        ("SupCon-In", ["supcon_in"]),
        ("crossview", ["cross_view"]),
    ],
)
def test_objective_by_another_name(name, ours):
    for call in (lambda: sk.info_nce_loss([Z0, Z1], objective=name), lambda: sk.InfoNCELoss(objective=name)):
        with pytest.raises(ValueError, match=r"^objective: expected one of supcon_out, ") as raised:
            call()
        _, hint = str(raised.value).split("; its name here is ")
        assert [o for o in sk.OBJECTIVES if repr(o) in hint] == [o for o in sk.OBJECTIVES if o in ours]


@pytest.mark.parametrize("name", ["triplet", "", None, 3])
def test_unknown_objective(name):
    with pytest.raises(ValueError, match=r"^objective: expected one of .*, got (?!.*its name here)"):
        sk.info_nce_loss([Z0, Z1], objective=name)


@pytest.fixture
def said(monkeypatch):
    """Record the warnings of a test, as in a process that has not warned yet."""
    monkeypatch.setattr(validate, "_warned", set())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def test_a_logit_scale_passed_as_temperature_warns_once(said):
    for _ in range(2):
        sk.info_nce_loss([Z0, Z1], temperature=14.3)
        sk.info_nce_loss([Z0, Z1], temperature=torch.tensor([20.0]))
    assert [str(w.message) for w in said] == [
        "selfsup_kernels: temperature: got 14.3; a logit scale, as CLIP has, is 1 / temperature"
    ]
    assert said[0].filename == __file__


@pytest.mark.parametrize("value", [torch.tensor(14.3), torch.tensor([14.3]), 15])
def test_a_logit_scale_of_any_type_warns(said, value):
    sk.info_nce_loss([Z0, Z1], temperature=value)
    assert len(said) == 1


def test_views_and_samples_in_the_wrong_order_warn_once(said):
    views = torch.stack([Z0, Z1], 1)
    for _ in range(2):
        sk.info_nce_loss(views)
    assert [str(w.message) for w in said] == [
        "selfsup_kernels: views: (V, B, D), got 6 views of 2 samples; is it (B, V, D)?"
    ]
    assert said[0].filename == __file__


def test_no_misleading_warning(said):
    sk.info_nce_loss([Z0, Z1], temperature=2.0)
    sk.info_nce_loss([Z0, Z1], temperature=8.0, normalize=False)  # inner products over sqrt(D)
    sk.info_nce_loss(torch.stack([Z0, Z1]))
    sk.info_nce_loss(list(torch.stack([Z0, Z1], 1)))  # a list cannot be transposed by mistake
    sk.info_nce_loss(torch.stack([Z0, Z1]).transpose(0, 1))  # transposed on purpose
    sk.compat.supcontrast.SupConLoss()(torch.stack([Z0, Z1]))
    sk.InfoNCELoss(0.07, learnable_temperature=True)(Z0, Z1)
    sk.methods.CMC(nn.Linear(5, 4), nn.Identity())(Z0, Z1)
    assert not said


@pytest.mark.unpoisoned
def test_no_warning_while_compiling(said):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sk.info_nce_loss(x, temperature=3.0), fullgraph=True, backend="eager")
    compiled(torch.stack([Z0, Z1], 1))
    torch._dynamo.reset()
    assert not [w for w in said if "selfsup_kernels" in str(w.message)]


def test_a_hint_points_at_the_users_line(monkeypatch):
    monkeypatch.setattr(validate, "_warned", set())
    criterion = sk.InfoNCELoss(3.0)
    with pytest.warns(UserWarning, match="logit scale") as caught:
        criterion(torch.ones(2, 3, 4))
    assert [w.filename for w in caught] == [__file__]
