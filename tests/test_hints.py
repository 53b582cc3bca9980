"""Users of other packages' names and layouts get a hint in the error, or one warning per process."""

import inspect
import pickle
import warnings

import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import names
from selfsup_kernels.core import hints, validate
from selfsup_kernels.info_nce.objectives import SYNONYMS

Z0, Z1 = randn(6, 5), randn(6, 5, seed=1)
LABELS = torch.tensor([0, 1, 0, 2, 1, 2])


def average():
    return sk.EMA(nn.Linear(5, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sk.info_nce_loss(torch.cat([Z0, Z1])), ValueError, r"^views: .*\(12, 5\); as two: views.chunk\(2\)$"),
        (lambda: sk.InfoNCELoss()(torch.cat([Z0, Z1])), ValueError, r"^views: .*chunk\(2\)"),
        (
            lambda: sk.info_nce_loss(Z0, labels=LABELS),
            ValueError,
            r"^views: .*\(6, 5\); as one view: \[views\]; as two",
        ),
        (
            lambda: sk.info_nce_loss([Z0]),
            ValueError,
            "^views: .*at least 2 views, got 1; one view needs labels$",
        ),
        (lambda: sk.info_nce_loss([Z0, Z1, Z1[:3]]), ValueError, r"^views\[2\]: .*got \(3, 5\); .*queue="),
        (lambda: sk.info_nce_loss([Z0, Z1], queue=randn(5, 7)), ValueError, r"^queue: .*\(5, 7\); queue.T$"),
        (lambda: sk.info_nce_loss(Z0.numpy()), TypeError, r"^views: expected a \(V, B, D\) tensor .*, got ndarray$"),
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
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS.repeat(2)),
            ValueError,
            r"^labels: expected shape \(6,\), one per sample, got \(12,\); the 2 views of a sample share one$",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=nn.functional.one_hot(LABELS)),
            ValueError,
            r"^labels: expected shape \(6,\), .*got \(6, 3\); classes of one-hot rows: labels.argmax\(1\)$",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS[:, None]),
            ValueError,
            r"^labels: .*got \(6, 1\); labels.flatten\(\)$",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS.numpy()),
            TypeError,
            r"^labels: expected an integer tensor, got ndarray; torch.as_tensor\(labels\)",
        ),
        (
            lambda: sk.info_nce_loss([Z0, Z1], labels=LABELS.to_sparse()),
            TypeError,
            "^labels: expected a dense tensor, got layout torch.sparse_coo$",
        ),
        (
            lambda: sk.byol_loss([Z0], [Z1]),
            ValueError,
            r"^predictions: .*at least 2 views, got 1; one view: two",
        ),
        (
            lambda: sk.ema_update_(nn.Linear(5, 4).state_dict(), nn.Linear(5, 4).state_dict(), 0.9),
            TypeError,
            r"^targets: .*got OrderedDict; pass its values\(\)",
        ),
        (lambda: average().update(nn.Linear(5, 4)), TypeError, r"^momentum: .*got Linear; .*update\(\) takes no model"),
        (
            lambda: average().load_state_dict(nn.Linear(5, 4).state_dict()),
            RuntimeError,
            "^state_dict: .*use ema.module",
        ),
    ],
)
def test_message_says_what_to_pass(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "example"),
    [
        (lambda: sk.info_nce_loss(Z0, Z1), "info_nce_loss([z0, z1], temperature=0.1, labels=y)"),
        (lambda: sk.info_nce_loss(Z0, Z1, temperature=0.1), "info_nce_loss([z0, z1], temperature=0.1, labels=y)"),
        (lambda: sk.info_nce_loss([Z0, Z1], 0.1), "info_nce_loss([z0, z1], temperature=0.1, labels=y)"),
        (lambda: sk.info_nce_value_and_grad(Z0, Z1), "info_nce_value_and_grad([z0, z1], temperature=0.1)"),
        (lambda: sk.contrastive_stats(Z0, Z1), "contrastive_stats([z0, z1])"),
        (lambda: sk.byol_loss(Z0, Z1, Z1, Z0), "byol_loss([p0, p1], [t0, t1])"),
        (lambda: sk.byol_loss([Z0, Z1]), "byol_loss([p0, p1], [t0, t1])"),
        (lambda: sk.BYOLLoss()(Z0, Z1, Z1, Z0), "criterion([p0, p1], [t0, t1])"),
        (lambda: sk.siglip_loss([Z0, Z1]), "siglip_loss(image, text)"),
        (lambda: sk.SigLIPLoss()([Z0, Z1]), "criterion(image, text)"),
        (lambda: sk.InfoNCELoss(0.1, "cross_view"), "InfoNCELoss(temperature=0.1, objective='cross_view')"),
        (lambda: sk.ema_update_([Z0], [Z1]), "ema_update_(target.parameters(), online.parameters(), 0.996)"),
        (lambda: sk.methods.SimCLR(nn.Identity()), "SimCLR(encoder, projector)"),
    ],
)
def test_a_call_of_another_form_shows_the_form(call, example):
    with pytest.raises(TypeError, match=r"positional argument.*; call it like ") as raised:
        call()
    assert str(raised.value).endswith(f"; call it like {example}")


@pytest.mark.parametrize(
    ("call", "ours"),
    [
        (lambda: sk.info_nce_loss([Z0, Z1], tau=0.1), "here it is temperature="),
        (lambda: sk.info_nce_loss([Z0, Z1], logit_scale=10), "here it is temperature=1 / logit_scale"),
        (lambda: sk.info_nce_loss([Z0, Z1], negatives=Z0), "here it is queue="),
        (lambda: sk.info_nce_loss([Z0, Z1], temprature=0.1), "here it is temperature="),
        (lambda: sk.InfoNCELoss(tau=0.1), "here it is temperature="),
        (lambda: sk.InfoNCELoss(gather_distributed=True), "here it is group='world'"),
        (lambda: sk.InfoNCELoss()(Z0, Z1, target=LABELS), "here it is labels="),
        (lambda: sk.siglip_loss(Z0, Z1, logit_scale=10), "here it is scale="),
        (lambda: sk.EMA(nn.Linear(5, 4), decay=0.99), "here it is momentum="),
        (lambda: sk.ema_update_([Z0], [Z1], decay=0.99), "here it is momentum="),
        (lambda: sk.methods.BYOL(*[nn.Linear(5, 5)] * 3, tau=0.99), "here it is momentum="),
        (lambda: sk.methods.BYOLContrast(*[nn.Linear(5, 5)] * 3, tau=0), "here it is temperature= or momentum="),
        (lambda: sk.chunked_backward(len, [Z0], loss_fn=sum, chunk_size=2), "here it is loss="),
        (lambda: sk.byol_loss(Z0, Z1, xyz=1), "the arguments are predictions, targets, eps, reduction, impl"),
    ],
)
def test_an_unknown_argument_by_the_name_here(call, ours):
    with pytest.raises(TypeError, match=r"unexpected keyword argument '\w+'; ") as raised:
        call()
    assert str(raised.value).endswith(f"; {ours}")


def test_other_names_of_arguments_are_of_arguments_that_exist():
    functions = [getattr(sk, name) for name in sk.__all__] + [getattr(sk.methods, name) for name in sk.methods.__all__]
    ours = {name for function in functions if callable(function) for name in inspect.signature(function).parameters}
    assert {text.partition("=")[0] for texts in hints.ARGUMENTS.values() for text in texts} <= ours


def test_an_error_inside_a_function_keeps_its_message():
    def encoder(x):
        return x.view()

    with pytest.raises(TypeError, match="view") as raised:
        sk.chunked_backward(encoder, [Z0], torch.sum, 2)
    assert "call it like" not in str(raised.value)


def test_functions_keep_their_signatures():
    assert [*inspect.signature(sk.byol_loss).parameters] == ["predictions", "targets", "eps", "reduction", "impl"]
    assert [*inspect.signature(sk.BYOLLoss).parameters] == ["eps", "reduction", "impl"]
    assert pickle.loads(pickle.dumps(sk.info_nce_loss)) is sk.info_nce_loss


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("NTXentLoss", ["InfoNCELoss(objective='supcon_out')", "compat.lightly.NTXentLoss"]),
        ("ClipLoss", ["InfoNCELoss(objective='cross_view')", "compat.open_clip.ClipLoss"]),
        ("supcon_loss", ["InfoNCELoss(objective='supcon_out')"]),
        ("InfoNCE", ["InfoNCELoss", "info_nce_loss"]),
        ("SigLipLoss", ["SigLIPLoss", "methods.SigLIP", "compat.open_clip.SigLipLoss"]),
        ("NormalizedMSELoss", ["BYOLLoss"]),
        ("ModelEmaV3", ["EMA", "compat.timm.ModelEmaV3"]),
        ("SimCLR", ["methods.SimCLR"]),
    ],
)
def test_a_class_by_another_name(name, ours):
    with pytest.raises(AttributeError, match=f"^module 'selfsup_kernels' has no attribute '{name}'; ") as raised:
        getattr(sk, name)
    assert set(ours) <= set(str(raised.value).partition("; here it is ")[2].split(", "))


def test_an_unknown_class():
    assert not hasattr(sk, "Transformer")
    with pytest.raises(AttributeError, match=r"has no attribute 'Transformer'$") as raised:
        _ = sk.Transformer
    assert (raised.value.name, raised.value.obj) == ("Transformer", sk)  # Python suggests a name that is spelt like it


def test_other_names_of_classes_are_of_classes_that_exist():
    assert set(names.NAMES.values()) <= {*sk.__all__, *(f"optim.{name}" for name in sk.optim.__all__)}
    assert all(name == hints.plain(name) for name in [*names.NAMES, *SYNONYMS])


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
