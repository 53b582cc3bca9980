"""Test the losses under ``torch.func``: values and first derivatives of the dense losses, errors for all others."""

import pytest
import torch
from helpers import assert_within, randn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from selfsup_kernels import InfoNCELoss, byol_loss, info_nce_loss, spec

X, T = randn(2, 6, 5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
XS, TS = randn(3, 2, 6, 5, dtype=torch.float64, seed=1), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
TARGET = randn(2, 6, 5, dtype=torch.float64, seed=2)
LABELS = torch.tensor([[0, 1, 0, 2, 1, 2], [2, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 1]])
QUEUES = randn(3, 7, 5, dtype=torch.float64, seed=3)


def everything(loss):
    def call(x, t, labels, queue):
        return loss(x, temperature=t, labels=labels, queue=queue, objective="supcon_in")

    return vmap(call)(XS, TS, LABELS, QUEUES)


def vmap_then_backward(loss):
    leaf = XS.clone().requires_grad_()
    vmap(loss)(leaf).sum().backward()
    return leaf.grad


def pulled_back(loss):
    value, pull = vjp(lambda x: loss(x, reduction="none"), X)
    return value, pull(torch.ones_like(value)), vmap(pull)(randn(3, 2, 6, dtype=torch.float64))


INFO_NCE = {
    "grad": lambda loss: grad(lambda x, t: loss(x, temperature=t), argnums=(0, 1))(X, T),
    "vmap": lambda loss: vmap(loss)(XS),
    "vmap over the last dimension": lambda loss: vmap(lambda x: loss(x, reduction="none"), in_dims=3, out_dims=2)(
        XS.movedim(0, 3)
    ),
    "vmap over temperatures": lambda loss: vmap(lambda t: loss(X, temperature=t))(TS),
    "vmap over everything": everything,
    "vmap in vmap": lambda loss: vmap(lambda t: vmap(lambda x: loss(x, temperature=t))(XS))(TS),
    "vmap of grad": lambda loss: vmap(grad(lambda x, t: loss(x, temperature=t), argnums=(0, 1)))(XS, TS),
    "grad of vmap": lambda loss: grad(lambda x, t: vmap(lambda x: loss(x, temperature=t))(x).sum(), argnums=(0, 1))(
        XS, T
    ),
    "jacrev": lambda loss: jacrev(lambda x, t: loss(x, temperature=t, reduction="none"), argnums=(0, 1))(X, T),
    "vmap of jacrev": lambda loss: vmap(jacrev(lambda x: loss(x, labels=LABELS[0], reduction="none")))(XS),
    "vmap of duplicates and logq": lambda loss: vmap(lambda x, ids, logq: loss(x, duplicates=ids, logq=logq))(
        XS, LABELS, randn(3, 6, dtype=torch.float64, seed=5)
    ),
    "vjp": pulled_back,
    "vmap, then backward": vmap_then_backward,
}
BYOL = {
    "grad": lambda loss: grad(lambda p: loss(p, TARGET))(X),
    "pairs": lambda loss: vmap(grad(lambda p: loss(p, TARGET[0])))(XS[:, 0]),
    "vmap over targets": lambda loss: vmap(lambda t: loss(X, t))(XS),
    "vmap of grad": lambda loss: vmap(grad(lambda p: loss(p, TARGET)))(XS),
    "jacrev": lambda loss: jacrev(lambda p: loss(p, TARGET, reduction="none"))(X),
}


def compare(transform, loss, reference):
    got, want = (torch.utils._pytree.tree_leaves(transform(f)) for f in (loss, reference))
    for i, (ours, truth) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == truth.shape
        assert_within(str(i), ours, truth)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("transform", INFO_NCE)
def test_info_nce(impl, transform, stacked):
    def loss(x, **arguments):
        return info_nce_loss(x if stacked else list(x.unbind(0)), impl=impl, **arguments)

    compare(INFO_NCE[transform], loss, spec.info_nce_loss)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("transform", BYOL)
def test_byol(impl, transform, stacked):
    def loss(p, t, **arguments):
        inputs = (p, t) if stacked or p.dim() == 2 else (list(p.unbind(0)), list(t.unbind(0)))
        return byol_loss(*inputs, impl=impl, **arguments)

    compare(BYOL[transform], loss, spec.byol_loss)


def test_parameters_of_a_module(impl):
    """A network with its loss works as a function of its parameters, and as an ensemble of three."""
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 4).double()
    criterion = InfoNCELoss(0.3, learnable_temperature=True, max_scale=50.0, impl=impl).double()
    weights = torch.stack([network.weight.detach() * k for k in (0.5, 1.0, 2.0)])

    def ours(weight, logit_scale):
        z = functional_call(network, {"weight": weight}, (X,))
        return functional_call(criterion, {"logit_scale": logit_scale}, (z,))

    def truth(weight, logit_scale):
        return spec.info_nce_loss(X @ weight.T + network.bias.detach(), temperature=(-logit_scale[0]).exp())

    scale = criterion.logit_scale.detach().clone()
    for apply in (
        lambda f: grad(f, argnums=(0, 1))(weights[0], scale),
        lambda f: vmap(grad(f, argnums=(0, 1)), in_dims=(0, None))(weights, scale),
    ):
        for got, want in zip(apply(ours), apply(truth), strict=True):
            assert_within("gradient", got, want)


LOSSES = {"info_nce": info_nce_loss, "byol": lambda x, **arguments: byol_loss(x, TARGET, **arguments)}


def autograd_of_grad(loss):
    leaf = X.clone().requires_grad_()
    return torch.autograd.grad(grad(loss)(leaf).sum(), leaf)


def grad_of_upstream(loss):
    return grad(lambda u: vjp(loss, X)[1](u)[0].sum())(torch.ones_like(T))


SECOND = {
    "grad of grad": lambda loss: grad(lambda x: grad(loss)(x).sum())(X),
    "grad of grad in something before": lambda loss: grad(lambda c: grad(lambda x: loss(c * x))(X).sum())(T),
    "jacrev of grad": lambda loss: jacrev(grad(loss))(X),
    "grad of jacrev": lambda loss: grad(lambda x: jacrev(loss)(x).sum())(X),
    "vmap of grad of grad": lambda loss: vmap(grad(lambda x: grad(loss)(x).sum()))(XS),
    "grad of vmap of grad": lambda loss: grad(lambda x: vmap(grad(loss))(x).sum())(XS),
    "autograd of grad": autograd_of_grad,
    "grad in the upstream gradient": grad_of_upstream,
    "autograd's hessian": lambda loss: torch.autograd.functional.hessian(loss, X),
}


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivative_is_refused(impl, loss, transform):
    with pytest.raises(RuntimeError, match="differentiable once"):
        SECOND[transform](lambda x: LOSSES[loss](x, impl=impl))


def test_second_derivative_in_another_argument_is_refused(impl):
    """A second derivative raises even if the inner and the outer gradient are in different arguments."""

    def loss(x, t):
        return info_nce_loss(x, temperature=t, impl=impl)

    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(lambda t: loss(x, t))(T))(X)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda t: grad(lambda x: loss(x, 2 * t))(X).sum())(T)


def test_gradient_of_something_else(impl):
    got = grad(lambda x: (x**3).sum() + info_nce_loss(X, impl=impl))(X)
    assert torch.equal(got, 3 * X**2)


@pytest.mark.parametrize("transform", [jacfwd, hessian, lambda f: jacfwd(grad(f))])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_is_refused(impl, loss, transform):
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*torch\.func\.grad"):
        transform(lambda x: LOSSES[loss](x, impl=impl))(X)


@pytest.mark.parametrize("loss", LOSSES)
def test_dual_numbers_are_refused(impl, loss):
    def call(x, **arguments):
        return LOSSES[loss](x, impl=impl, **arguments)

    for transform in (jvp, linearize):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            transform(call, *((X,), (X,)) if transform is jvp else (X,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            call(forward_ad.make_dual(X, X))
        assert torch.equal(call(X), call(X.clone()))


def test_batch_of_nothing(impl):
    with pytest.raises(ValueError, match=r"torch\.vmap: expected at least one element"):
        vmap(lambda x: info_nce_loss(x, impl=impl))(XS[:0])


def test_temperature_that_cannot_be_read_is_not_a_number(impl):
    """Under a transform values cannot be checked; a bad temperature gives NaN."""
    got = vmap(lambda t: info_nce_loss(X, temperature=t, impl=impl))(torch.tensor([-1.0, 0.0, torch.inf, 0.1]))
    assert got.isnan().tolist() == [True, True, True, False]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("loss", LOSSES)
def test_torch_compile_of_a_transform(impl, loss):
    """Compiling a transform raises: Dynamo (torch 2.11 to 2.13) would differentiate our forward, which gives zeros."""

    def call(x):
        return LOSSES[loss](x, impl=impl)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compile cannot trace a loss under torch\.func"):
        torch.compile(grad(call), backend="aot_eager", fullgraph=True)(X)
    torch._dynamo.reset()
    compiled = torch.compile(grad(call), backend="aot_eager")(X)
    torch.testing.assert_close(compiled, grad(call)(X), rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()
