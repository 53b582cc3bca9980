"""Test ``impl="reference"`` on few samples, where it uses PyTorch's operators and autograd."""

import pytest
import torch
from helpers import POOLED_OBJECTIVES, assert_within, randn, random_labels, run

from selfsup_kernels import byol_loss, info_nce_loss, spec
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce import few_scores
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

X = randn(3, 5, 4, dtype=torch.float64)


def cases(objective):
    """Yield views and arguments of every branch: two and more views, a core view, labels, a queue, rows without
    positives or negatives."""
    queue = randn(4, 4, dtype=torch.float64, seed=2)
    yield X[:2], {}
    yield X, {"queue": queue}
    yield X, {"core_view": 1}
    yield X[:, :1], {"queue": queue}
    duplicates = torch.tensor([2, 0, 2, 2, 1])
    logq = randn(3, 5, dtype=torch.float64, seed=4)
    yield X, {"duplicates": duplicates, "logq": logq}
    yield X, {"duplicates": torch.zeros(5, dtype=torch.int64)}
    if objective in LABEL_OBJECTIVES:
        yield X, {"labels": duplicates, "logq": logq}
        for labels in (random_labels(5, 3), torch.arange(5), torch.zeros(5, dtype=torch.int64)):
            yield X, {"labels": labels, "queue": queue}
            if objective in POOLED_OBJECTIVES:
                yield X[:1], {"labels": labels}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_branch_without_an_anomaly(objective):
    for x, arguments in cases(objective):
        arguments |= {"objective": objective, "reduction": "none"}
        upstream = randn(*x.shape[:2], seed=3)
        with torch.autograd.set_detect_anomaly(True):  # raises if a step of the backward makes NaN
            got = run(info_nce_loss, x, 0.3, upstream, impl="reference", **arguments)
        want = run(spec.info_nce_loss, x, 0.3, upstream, **arguments)
        for name, ours, truth in zip(("loss", "grad", "temperature"), got, want, strict=True):
            assert not ours.isnan().any()
            finite = truth.isfinite()  # autograd's gradients of the dense loss are NaN where a row has no negative
            assert_within(name, ours[finite], truth[finite], floor=1e-14)
        assert torch.equal(got[0].isposinf(), want[0].isposinf())
        assert torch.equal(got[0].isneginf(), want[0].isneginf())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_results_are_not_finite_where_the_dense_loss_is_not(objective, num_views, normalize, value):
    views = randn(num_views, 20, 8)
    views[1, 2, 3] = value
    upstream = torch.ones(num_views, 20)
    arguments = {"objective": objective, "normalize": normalize, "reduction": "none"}
    got = run(info_nce_loss, views, 0.1, upstream, impl="reference", **arguments)
    want = run(spec.info_nce_loss, views, 0.1, upstream, **arguments)
    finite = want[0].isfinite()
    assert not finite.all()
    assert torch.equal(got[0].isfinite(), finite)
    assert_within("finite losses", got[0][finite], want[0][finite].double())
    assert not got[1][~finite].isfinite().all(-1).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_byol_of_a_row_that_is_not_finite(value):
    p, t = randn(2, 5, 4), randn(2, 5, 4, seed=1)
    p[0, 2, 1] = value
    p.requires_grad_()
    loss = byol_loss(p, t, reduction="none", impl="reference")
    loss.sum().backward()
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[0, 2] = True
    assert torch.equal(~loss.isfinite(), bad)
    assert torch.equal(~p.grad.isfinite().all(-1), bad)
    assert not p.grad[0, 2].isfinite().any()


@pytest.mark.parametrize("eps", [1e-12, 1e-39, 1e-300])
def test_row_of_zeros_above_any_floor(eps):
    views = randn(2, 6, 4)
    views[0, 1] = 0
    got = info_nce_loss(views, eps=eps, temperature=torch.tensor(1e39, dtype=torch.float64), impl="reference")
    assert_within("loss", got, torch.tensor(11.0).double().log())
    assert info_nce_loss(views, eps=eps, impl="reference").isfinite()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("objective", ["supcon_out", "cross_view"])
def test_queue_that_is_filled_before_the_backward(objective, normalize):
    views, queue = randn(2, 5, 4), randn(6, 4, seed=1)
    arguments = {"objective": objective, "normalize": normalize, "impl": "reference"}
    want = run(info_nce_loss, views, 0.5, queue=queue.clone(), **arguments)[1]
    views.requires_grad_()
    loss = info_nce_loss(views, temperature=0.5, queue=queue, **arguments)
    queue.copy_(randn(6, 4, seed=2))
    loss.backward()
    torch.testing.assert_close(views.grad, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "queue", "labelled", "scores"),
    [
        ("supcon_out", 0, False, 16 * 16),
        ("supcon_out", 0, True, 16 * 16 / 16),
        ("supcon_out", 3, False, 16 * (16 + 3) / 16),
        ("pairwise", 0, False, 16 * 16 / 16),
        ("cross_view", 0, False, 8 * 8 / 64),
        ("cross_view", 3, False, (8 * 8 + 16 * 3) / 64),
    ],
)
def test_the_op_takes_over_at_the_size_limit(objective, queue, labelled, scores, dtype, monkeypatch):
    monkeypatch.setattr(few_scores, "_MB", scores * max(dtype.itemsize, 4))
    names, op = [], ops.overload
    monkeypatch.setattr(ops, "overload", lambda name, impl: names.append(name) or op(name, impl))
    rows = randn(queue, 4, dtype=dtype, seed=1) if queue else None
    for samples, called in ((8, []), (9, ["info_nce_forward"])):
        arguments = {"objective": objective, "labels": random_labels(samples, 3) if labelled else None}
        views = randn(2, samples, 4, dtype=dtype)
        got = info_nce_loss(views, queue=rows, impl="reference", **arguments)
        assert names == called
        wide = None if rows is None else rows.double()
        assert_within("loss", got, spec.info_nce_loss(views.double(), queue=wide, **arguments))


@pytest.mark.parametrize("how", ["trace", "export", "autocast", "vmap"])
def test_the_op_takes_calls_that_autograd_would_get_wrong(how, monkeypatch):
    """With autograd a graph would fail for other sizes, autocast would multiply in 16 bits, and vmap need too much
    memory."""
    names, op = [], ops.overload
    monkeypatch.setattr(ops, "overload", lambda name, impl: names.append(name) or op(name, impl))
    views, more = randn(2, 6, 4), randn(2, 9, 4, seed=1)

    def loss(x):
        return info_nce_loss(x, impl="reference") + byol_loss(x, x.flip(0), impl="reference")

    if how == "trace":
        torch.testing.assert_close(torch.jit.trace(loss, (views,))(more), loss(more))
    elif how == "export":
        module = torch.nn.Module()
        module.forward = loss
        exported = torch.export.export(module, (views,), dynamic_shapes={"x": {1: torch.export.Dim("b")}})
        torch.testing.assert_close(exported.module()(more), loss(more))
    elif how == "autocast":
        views.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss(views)
    else:
        torch.func.vmap(loss)(views.expand(3, 2, 6, 4))
    assert {"info_nce_forward", "byol_forward"} <= set(names)
