"""Bad input to the losses raises an exception that names the argument, the expected value and the given one."""

import math
import re

import pytest
import torch
from helpers import randn

from selfsup_kernels import byol_loss, ema_update_, info_nce_loss
from selfsup_kernels.core import backends
from selfsup_kernels.info_nce.objectives import OBJECTIVES

VIEWS = randn(2, 4, 8)
LABELS = torch.zeros(4, dtype=torch.int64)
META = torch.device("meta")

BAD_VIEWS = {
    "one matrix": (VIEWS[0], ValueError),
    "a vector": (VIEWS[0, 0], ValueError),
    "four dimensions": (VIEWS[None], ValueError),
    "no views": ([], ValueError),
    "no stacked views": (VIEWS[:0], ValueError),
    "one view": ([VIEWS[0]], ValueError),
    "one stacked view": (VIEWS[:1], ValueError),
    "no samples": (VIEWS[:, :0], ValueError),
    "no features": (VIEWS[:, :, :0], ValueError),
    "batches that differ": ([VIEWS[0], VIEWS[1, :3]], ValueError),
    "batches that would broadcast": ([VIEWS[0], VIEWS[1, :1]], ValueError),
    "features that differ": ([VIEWS[0], VIEWS[1, :, :5]], ValueError),
    "dimensions that differ": ([VIEWS[0], VIEWS], ValueError),
    "vectors": ([VIEWS[0, 0], VIEWS[1, 0]], ValueError),
    "None": (None, TypeError),
    "a number": (1.0, TypeError),
    "a string": ("views", TypeError),
    "lists of numbers": ([[1.0], [2.0]], TypeError),
    "an array": (VIEWS.numpy(), TypeError),
    "a generator": ((v for v in VIEWS), TypeError),
    "a view that is None": ([VIEWS[0], None], TypeError),
    "integers": (VIEWS.long(), TypeError),
    "bools": (VIEWS > 0, TypeError),
    "complex numbers": (VIEWS.to(torch.complex64), TypeError),
    "dtypes that differ": ([VIEWS[0], VIEWS[1].double()], TypeError),
    "sparse": ([VIEWS[0].to_sparse(), VIEWS[1].to_sparse()], TypeError),
    "devices that differ": ([VIEWS[0], VIEWS[1].to(META)], ValueError),
}

BAD_ARGUMENTS = {
    "temperature": [
        (0.0, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (torch.tensor(0.0), ValueError),
        (torch.tensor(-1.0), ValueError),
        (torch.tensor(math.nan), ValueError),
        (torch.tensor(math.inf), ValueError),
        (torch.tensor([0.1, 0.2]), ValueError),
        (torch.tensor([]), ValueError),
        (torch.tensor(0.1, device=META), ValueError),
        (torch.tensor(1), TypeError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
    "objective": [("supcon", ValueError), ("", ValueError), (None, ValueError), (0, ValueError)],
    "reduction": [("avg", ValueError), (None, ValueError), (1, ValueError)],
    "impl": [
        ("gpu", ValueError),
        ("", ValueError),
        (None, ValueError),
        ("triton", RuntimeError),
        ("cuda", RuntimeError),
    ],
    "eps": [(0, ValueError), (-1e-8, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1e-8", TypeError)],
    "labels": [
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(8, dtype=torch.int64), ValueError),
        (torch.zeros(1, dtype=torch.int64), ValueError),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError),
        (torch.tensor(0), ValueError),
        (LABELS.to(META), ValueError),
        (torch.zeros(4), TypeError),
        (torch.zeros(4, dtype=torch.bool), TypeError),
        ([0, 0, 1, 1], TypeError),
        (1, TypeError),
    ],
    "duplicates": [
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError),
        (LABELS.to(META), ValueError),
        (torch.zeros(4), TypeError),
        (torch.zeros(4, dtype=torch.bool), TypeError),
        ([0, 0, 1, 1], TypeError),
        (True, TypeError),
    ],
    "logq": [
        (torch.zeros(3), ValueError),
        (torch.zeros(4, 2), ValueError),
        (torch.zeros(1, 4), ValueError),
        (torch.tensor(0.0), ValueError),
        (torch.zeros(4, device=META), ValueError),
        (LABELS, TypeError),
        ([0.0, 0.0, 0.0, 0.0], TypeError),
        (0.5, TypeError),
    ],
    "queue": [
        (randn(5, 7), ValueError),
        (randn(5, 1), ValueError),
        (randn(8), ValueError),
        (randn(2, 5, 8), ValueError),
        (randn(0, 8), ValueError),
        (randn(5, 8).to(META), ValueError),
        (randn(5, 8).double(), TypeError),
        (randn(5, 8).long(), TypeError),
        (randn(5, 8).tolist(), TypeError),
        (5, TypeError),
    ],
    "core_view": [(2, ValueError), (-1, ValueError), (0.0, ValueError), (True, ValueError), ("0", ValueError)],
}


def cases(table):
    return [
        pytest.param(name, value, error, id=f"{name}={value!r:.30}") for name, v in table.items() for value, error in v
    ]


@pytest.mark.parametrize("what", BAD_VIEWS)
def test_views(impl, what):
    value, error = BAD_VIEWS[what]
    with pytest.raises(error, match=r"^views") as raised:
        info_nce_loss(value, impl=impl)
    assert "expected" in str(raised.value)


@pytest.mark.parametrize(("name", "value", "error"), cases(BAD_ARGUMENTS))
def test_arguments(name, value, error):
    with pytest.raises(error, match=f"^{name}") as raised:
        info_nce_loss(VIEWS, **{name: value})
    message = str(raised.value)
    assert "expected" in message or error is RuntimeError
    if isinstance(value, (int, float, str)):
        assert str(value) in message or type(value).__name__ in message, message


def test_one_sample_has_no_negatives(impl):
    with pytest.raises(ValueError, match=r"^views.*2 samples"):
        info_nce_loss(VIEWS[:, :1], impl=impl)
    with pytest.raises(ValueError, match=r"^views.*2 samples"):
        info_nce_loss(VIEWS[:, :1], labels=LABELS[:1], impl=impl)


def test_labels_need_an_objective_that_knows_them():
    with pytest.raises(ValueError, match=r"^labels.*objective"):
        info_nce_loss(VIEWS, labels=LABELS, objective="pairwise")


def test_labels_across_views_need_two():
    with pytest.raises(ValueError, match=r"^views: expected at least 2 views, got 1"):
        info_nce_loss(VIEWS[:1], labels=LABELS, objective="cross_view")


def test_labels_and_duplicates_exclude_each_other():
    with pytest.raises(ValueError, match=r"^duplicates: expected None together with labels"):
        info_nce_loss(VIEWS, labels=LABELS, duplicates=LABELS)


def test_logq_and_a_queue_exclude_each_other():
    with pytest.raises(ValueError, match=r"^logq: expected None together with a queue"):
        info_nce_loss(VIEWS, logq=torch.zeros(4), queue=randn(5, 8))


def test_labels_and_core_view_exclude_each_other():
    with pytest.raises(ValueError, match=r"^core_view"):
        info_nce_loss(VIEWS, labels=LABELS, core_view=0)


def test_unknown_and_positional_arguments():
    with pytest.raises(TypeError):
        info_nce_loss(VIEWS, 0.1)
    with pytest.raises(TypeError):
        info_nce_loss(VIEWS, tau=0.1)


def test_impl_that_cannot_run_says_why_and_what_to_do(monkeypatch):
    with pytest.raises(RuntimeError, match=r"impl='triton'.*auto"):
        info_nce_loss(VIEWS, impl="triton")
    monkeypatch.setattr(backends, "load_extension", lambda: (None, "the C++ extension was not built: no compiler."))
    backends._reasons.clear()
    try:
        with pytest.raises(RuntimeError, match=r"impl='cpu'.*no compiler.*pip install"):
            info_nce_loss(VIEWS, impl="cpu")
        assert torch.equal(info_nce_loss(VIEWS), info_nce_loss(VIEWS, impl="reference"))
    finally:
        backends._reasons.clear()


def test_impl_cpu_refuses_tensors_elsewhere():
    if backends.unavailable("cpu") is None:
        with pytest.raises(RuntimeError, match=r"impl='cpu'.*meta"):
            info_nce_loss(VIEWS.to(META), impl="cpu")


@pytest.mark.parametrize(
    ("impl", "op", "call"),
    [
        ("cuda", "info_nce", lambda impl: info_nce_loss(VIEWS, impl=impl)),
        ("triton", "byol", lambda impl: byol_loss(VIEWS, VIEWS, impl=impl)),
        ("triton", "ema_update_", lambda impl: ema_update_([VIEWS.clone()], [VIEWS], 0.5, impl=impl)),
    ],
)
def test_an_impl_that_the_op_does_not_have(impl, op, call):
    other = "triton" if impl == "cuda" else "cuda"
    message = f"impl='{impl}' has no {op}, which reference, cpu, {other} have; use impl='auto'"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(impl)


@pytest.mark.parametrize("what", [w for w in BAD_VIEWS if w not in ("one matrix",)])
def test_predictions(impl, what):
    value, error = BAD_VIEWS[what]
    with pytest.raises(error, match=r"^(predictions|targets)"):
        byol_loss(value, VIEWS, impl=impl)


@pytest.mark.parametrize(
    "value",
    [VIEWS[0], VIEWS[:1], VIEWS[:, :3], VIEWS[:, :1], VIEWS[:, :, :3], VIEWS[:, :, :1], [VIEWS[0]], randn(3, 4, 8), []],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else f"list of {len(v)}",
)
def test_targets_of_another_shape(impl, value):
    with pytest.raises(ValueError, match=r"^targets.*expected"):
        byol_loss(VIEWS, value, impl=impl)


@pytest.mark.parametrize("value", [None, 1.0, "targets", VIEWS.tolist(), VIEWS.long(), VIEWS.double(), VIEWS.numpy()])
def test_targets_of_another_type(impl, value):
    with pytest.raises(TypeError, match=r"^targets.*expected"):
        byol_loss(VIEWS, value, impl=impl)


@pytest.mark.parametrize("value", [VIEWS, VIEWS[0, :3], VIEWS[0, :1], VIEWS[0, 0], VIEWS[:1], VIEWS[0].to(META)])
def test_targets_of_pairs(impl, value):
    with pytest.raises(ValueError, match=r"^targets.*expected"):
        byol_loss(VIEWS[0], value, impl=impl)


@pytest.mark.parametrize("value", [[VIEWS[0]], VIEWS[0].double(), None])
def test_targets_of_pairs_of_another_type(impl, value):
    with pytest.raises(TypeError, match=r"^targets.*expected"):
        byol_loss(VIEWS[0], value, impl=impl)


@pytest.mark.parametrize(
    ("name", "value", "error"), cases({name: BAD_ARGUMENTS[name] for name in ("reduction", "impl", "eps")})
)
def test_byol_arguments(name, value, error):
    with pytest.raises(error, match=f"^{name}"):
        byol_loss(VIEWS, VIEWS, **{name: value})


@pytest.mark.parametrize("loss", ["byol", *OBJECTIVES])
def test_second_derivative_is_refused(impl, loss):
    x, t = VIEWS.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    if loss == "byol":
        value, inputs = byol_loss(x, VIEWS, impl=impl), [x]
    else:
        value, inputs = info_nce_loss(x, temperature=t, objective=loss, impl=impl), [x, t]
    grads = torch.autograd.grad(value, inputs, create_graph=True)
    for grad in grads:
        for wanted in inputs:
            with pytest.raises(RuntimeError, match="once"):
                torch.autograd.grad(grad.sum(), wanted, retain_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            (grad.sum() + x.sum()).backward(retain_graph=True)


def test_second_derivative_in_the_upstream_gradient_is_refused(impl):
    """The gradient is linear in the upstream gradient, so this second derivative is not zero either."""
    weight, x = torch.tensor(2.0, requires_grad=True), VIEWS.clone().requires_grad_()
    for loss in (info_nce_loss(x, impl=impl), byol_loss(x, VIEWS.flip(0), impl=impl)):
        (grad,) = torch.autograd.grad(weight * loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(grad.sum(), weight)


def test_gradient_of_something_else_in_a_graph_of_gradients(impl):
    """``create_graph=True`` for another term works as long as our gradient is not differentiated again."""
    x = VIEWS.clone().requires_grad_()
    torch.autograd.grad(info_nce_loss(x, impl=impl), x, create_graph=True)
    (penalty,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(penalty.sum(), x)[0], 6 * VIEWS)


def test_arguments_are_not_modified(impl):
    x, queue, labels = VIEWS.clone(), randn(3, 8), LABELS.clone()
    info_nce_loss(x.requires_grad_(), queue=queue, labels=labels, impl=impl).backward()
    byol_loss(x, VIEWS, impl=impl).backward()
    assert torch.equal(x, VIEWS)
    assert torch.equal(queue, randn(3, 8))
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float32])
def test_labels_of_other_dtypes(impl, dtype):
    with pytest.raises(TypeError, match="labels"):
        info_nce_loss(torch.randn(2, 3, 4), labels=torch.ones(3).to(dtype), impl=impl)


def test_sparse_labels(impl):
    with pytest.raises(TypeError, match="labels"):
        info_nce_loss(torch.randn(2, 3, 4), labels=torch.tensor([1, 0, 2]).to_sparse(), impl=impl)
