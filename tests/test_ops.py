"""Check every overload of every op with opcheck, and the losses with gradcheck."""

import pytest
import torch
from helpers import LOW_PRECISION, info_nce_call, randn

from selfsup_kernels import byol_loss, info_nce_loss
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

pytestmark = pytest.mark.sanitize


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Use one thread, since the tests make thousands of calls of a microsecond each."""
    torch.set_num_threads(1)


# The ops have no autograd formula: the autograd Functions above them do, and gradcheck tests those.
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float64, torch.float32, *LOW_PRECISION]

# name: (ids, logq or queue, temperature as a tensor, objective, core view, normalize, reduction)
FORMS = {
    "plain": (None, None, False, "supcon_out", -1, True, "mean"),
    "per anchor": (None, None, True, "pairwise", -1, True, "none"),
    "labels": ("labels", None, False, "supcon_in", -1, True, "sum"),
    "queue": (None, "queue", True, "cross_view", 1, False, "mean"),
    "labels and queue": ("labels", "queue", False, "decoupled", -1, True, "none"),
    "labels across views": ("labels", None, False, "cross_view", -1, True, "mean"),
    "duplicates and logq": ("duplicates", "logq", False, "per_positive", -1, True, "mean"),
    "labels and logq": ("labels", "logq", False, "supcon_out", -1, True, "none"),
}


def info_nce_arguments(form, dtype):
    kind, columns, tensor, objective, core, normalize, reduction = FORMS[form]
    views = list(randn(3, 5, 4, dtype=dtype).unbind(0))
    ids = torch.tensor([1, 2, 1, 0, 2]) if kind else None
    logq = randn(3, 5, dtype=ops.accumulation_dtype(dtype)).abs() if columns == "logq" else None
    queue = randn(6, 4, dtype=dtype, seed=1) if columns == "queue" else None
    named = {kind: ids} if kind else {}
    call = info_nce_call(
        views,
        queue=queue,
        objective=objective,
        core_view=core,
        normalize=normalize,
        reduction=reduction,
        temperature=0.0 if tensor else 0.2,
        **named,
    )
    return views, ids, logq, queue, torch.tensor(0.2) if tensor else None, *call


def test_every_op_is_tested_here():
    losses = {"info_nce_forward", "info_nce_backward", "byol_forward", "byol_backward"}
    elsewhere = {"siglip_value", "siglip_value_and_grad"}  # tests/test_siglip.py
    assert set(ops.SCHEMAS) == losses | elsewhere | {"fused_sgd_", "fused_adamw_", "ema_update_"}
    for name in ops.SCHEMAS:
        gpu = {"triton", "launch"} if "info_nce" in name or "siglip" in name else {"cuda"}
        assert set(getattr(torch.ops.selfsup_kernels, name).overloads()) == {"reference", "cpu"} | gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_info_nce(impl, form, dtype):
    arguments = info_nce_arguments(form, dtype)
    forward = ops.overload("info_nce_forward", impl)
    torch.library.opcheck(forward, arguments, test_utils=UTILS)

    _, ids, _, _, _, *call = arguments
    loss, *saved = forward(*arguments)
    backward = (torch.ones_like(loss), *saved, ids, *call, True, dtype)
    torch.library.opcheck(ops.overload("info_nce_backward", impl), backward, test_utils=UTILS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("reduction", range(len(ops.REDUCTIONS)))
def test_opcheck_byol(impl, reduction, num_views, dtype):
    p, t = (list(randn(num_views, 5, 4, dtype=dtype, seed=seed).unbind(0)) for seed in (0, 1))
    forward = ops.overload("byol_forward", impl)
    torch.library.opcheck(forward, (p, t, 1e-12, reduction), test_utils=UTILS)
    loss, stats = forward(p, t, 1e-12, reduction)
    arguments = (torch.ones_like(loss), p, t, stats, reduction)
    torch.library.opcheck(ops.overload("byol_backward", impl), arguments, test_utils=UTILS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "tensor momentum", "stochastic"])
def test_opcheck_ema(impl, form, dtype):
    targets = [randn(4, 3, dtype=dtype), randn(7, dtype=torch.float32, seed=1), torch.tensor(5)]
    sources = [randn(4, 3, seed=2), randn(7, dtype=dtype, seed=3), torch.tensor(6)]
    momentum = torch.tensor(0.9) if form == "tensor momentum" else None
    seed = torch.tensor(3) if form == "stochastic" else None
    arguments = (targets, sources, momentum, 0.0 if momentum is not None else 0.9, seed)
    torch.library.opcheck(ops.overload("ema_update_", impl), arguments, test_utils=UTILS)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck_info_nce(impl, objective, normalize, num_views):
    def loss(x, t):
        return info_nce_loss(x, temperature=t, objective=objective, normalize=normalize, reduction="none", impl=impl)

    x = randn(num_views, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, torch.tensor(0.6, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize(
    ("form", "reduction"),
    [
        ("queue", "none"),
        ("core", "mean"),
        ("labels", "none"),
        ("labels and queue", "sum"),
        ("labels and logq", "none"),
        ("duplicates and logq", "mean"),
        ("list", "mean"),
    ],
)
def test_gradcheck_info_nce_forms(impl, form, reduction):
    ids = {name: torch.tensor([0, 1, 0, 2]) for name in ("labels", "duplicates") if name in form}
    logq = {"logq": randn(3, 4, dtype=torch.float64, seed=2)} if "logq" in form else {}
    queue = {"queue": randn(5, 3, dtype=torch.float64, seed=1)} if "queue" in form else {}
    core = {"core_view": 0} if form == "core" else {}
    x = randn(3, 4, 3, dtype=torch.float64).requires_grad_()
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for objective in LABEL_OBJECTIVES if "labels" in ids else ("per_positive", "cross_view"):

        def loss(v, t, objective=objective):
            views = list(v.unbind(0)) if form == "list" else v
            arguments = {"temperature": t, "objective": objective, "reduction": reduction, "impl": impl}
            return info_nce_loss(views, **arguments, **ids, **logq, **queue, **core)

        assert torch.autograd.gradcheck(loss, (x, t))


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (3, 4, 3), (5, 2, 7)], ids=str)
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_gradcheck_byol(impl, reduction, shape):
    p = randn(*shape, dtype=torch.float64).requires_grad_()
    t = randn(*shape, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x: byol_loss(x, t, reduction=reduction, impl=impl), (p,))
