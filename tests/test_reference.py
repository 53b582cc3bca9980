"""``impl="reference"`` on few samples: PyTorch's own operators, differentiated by autograd."""

from functools import partial

import pytest
import torch
from helpers import assert_within, randn, random_labels, run
from torch.func import hessian, jvp

from selfsup_kernels import backends, byol_loss, info_nce_loss
from selfsup_kernels.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.reference import dense, eager

X, TARGET = randn(3, 5, 4, dtype=torch.float64), randn(3, 5, 4, dtype=torch.float64, seed=1)


def forms(objective):
    """Arguments of every branch: two views and more, a core view, labels, a queue."""
    queue = randn(4, 4, dtype=torch.float64, seed=2)
    yield X[:2], {}
    yield X, {"queue": queue}
    yield X, {"core_view": 1}
    if objective in LABEL_OBJECTIVES:
        yield X, {"labels": random_labels(5, 3), "queue": queue}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_second_and_forward_mode_derivatives_of_info_nce(objective):
    for x, arguments in forms(objective):
        arguments |= {"temperature": 0.3, "objective": objective}
        ours = partial(info_nce_loss, impl="reference", **arguments)
        truth = partial(dense.info_nce_loss, **arguments)
        assert_within("hessian", hessian(ours)(x), hessian(truth)(x))
        along = (TARGET[: len(x)],)
        for got, want in zip(jvp(ours, (x,), along), jvp(truth, (x,), along), strict=True):
            assert_within("forward", got, want)


def test_second_derivative_of_byol():
    got = hessian(lambda p: byol_loss(p, TARGET, impl="reference"))(X)
    assert_within("hessian", got, hessian(lambda p: dense.byol_loss(p, TARGET))(X))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_finite_where_the_dense_loss_is_not(objective, num_views, normalize, value):
    views = randn(num_views, 20, 8)
    views[1, 2, 3] = value
    upstream = torch.ones(num_views, 20)
    arguments = {"objective": objective, "normalize": normalize, "reduction": "none"}
    got = run(info_nce_loss, views, 0.1, upstream, impl="reference", **arguments)
    want = run(dense.info_nce_loss, views, 0.1, upstream, **arguments)
    finite = want[0].isfinite()
    assert not finite.all()
    assert torch.equal(got[0].isfinite(), finite)
    assert_within("finite losses", got[0][finite], want[0][finite].double())
    assert not got[1][~finite].isfinite().all(-1).any()


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


@pytest.mark.parametrize(
    ("objective", "queue", "scores"),
    [("supcon_out", None, 16 * 16), ("supcon_out", randn(3, 4, seed=1), 16 * 19), ("cross_view", None, 8 * 8 // 4)],
    ids=["plain", "queue", "cross_view"],
)
def test_the_op_takes_what_is_one_sample_too_large(objective, queue, scores, monkeypatch):
    monkeypatch.setattr(eager, "_SCORES", scores)
    names, op = [], backends.op
    monkeypatch.setattr(backends, "op", lambda name, impl: names.append(name) or op(name, impl))
    for samples, called in ((8, []), (9, ["info_nce_forward"])):
        views = randn(2, samples, 4)
        got = info_nce_loss(views, queue=queue, objective=objective, impl="reference")
        assert names == called
        assert_within(
            "loss",
            got,
            dense.info_nce_loss(views.double(), queue=queue if queue is None else queue.double(), objective=objective),
        )
