"""Chunked encoding: trained and frozen parts, parameter hooks, and calls that reach nothing trainable."""

import copy
import functools

import pytest
import torch
from test_chunked import assert_equal, batch, contrast, gradients, mlp, one_pass
from torch import nn
from torch.utils.checkpoint import checkpoint

import selfsup_kernels as sk

NOTHING = "element 0 of tensors does not require grad"


class Reentrant(nn.Module):
    """Reentrant checkpointing gives no gradient if its inputs do not require grad."""

    def __init__(self, head):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(5, 5, dtype=torch.float64) if head else nn.Identity()

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=True))


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    @torch.no_grad()
    def forward(self, x):
        return self.body(x)


def frozen():
    return mlp().requires_grad_(False)


def unseen(module):
    return lambda x: module(x)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: Reentrant(head=False), contrast),
        (NoGrad, contrast),
        (frozen, contrast),
        (lambda: unseen(frozen()), contrast),
        (mlp, lambda rows: contrast([r.detach() for r in rows])),
        # The loss uses only the view that has no gradient.
        (lambda: [mlp(), NoGrad()], lambda rows: contrast([rows[0].detach(), rows[1]])),
        (lambda: [mlp(), frozen()], lambda rows: contrast([rows[0].detach(), rows[1]])),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_nothing_to_train_raises_as_one_pass_does(make, loss):
    encoder = make()
    with pytest.raises(RuntimeError, match=NOTHING):
        one_pass(loss, copy.deepcopy(encoder), batch())
    with pytest.raises(RuntimeError, match=NOTHING):
        sk.chunked_backward(encoder, batch(), loss, 4)


@pytest.mark.parametrize("make", [NoGrad, frozen, lambda: unseen(frozen())])
def test_the_loss_alone_may_be_trained(make):
    encoder = make()
    criterion = sk.InfoNCELoss(0.2, learnable_temperature=True, impl="reference").double()
    twin = copy.deepcopy(criterion)
    one_pass(twin, encoder, batch())
    sk.chunked_backward(encoder, batch(), criterion, 4)
    assert_equal(gradients(criterion), gradients(twin), 1e-7)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_part_without_gradients_due_to_checkpointing():
    """The head is trained and the body keeps a gradient of None, as in one pass."""
    encoder = Reentrant(head=True)
    twin = copy.deepcopy(encoder)
    one_pass(contrast, twin, batch())
    sk.chunked_backward(encoder, batch(), contrast, 4)
    assert all(p.grad is None for m in (encoder.body, twin.body) for p in m.parameters())
    assert_equal(gradients(encoder.head), gradients(twin.head))


def test_a_tower_that_the_loss_does_not_use():
    """The unused tower's gradients stay None, and its buffers are updated once per chunk."""
    used, other = mlp(0), mlp(1, norm=True)
    sk.chunked_backward([used, other], batch(), lambda rows: rows[0].square().sum() + 0 * rows[1].detach().sum(), 4)
    assert all(p.grad is not None for p in used.parameters())
    assert all(p.grad is None for p in other.parameters())
    assert other[1].num_batches_tracked == 3


@pytest.mark.parametrize("way", ["function", "argument", "keyword"])
def test_a_frozen_module_in_a_function_that_trains_something_else(way):
    body = frozen()

    def prompted(module, x, prompt):
        return module(x + prompt)

    def encoder(prompt):
        if way == "function":
            return lambda x: prompted(body, x, prompt)
        if way == "argument":
            return functools.partial(lambda module, prompt, x: prompted(module, x, prompt), body, prompt)
        return functools.partial(prompted, body, prompt=prompt)

    prompt, twin = (torch.full((6,), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    one_pass(contrast, encoder(twin), batch())
    sk.chunked_backward(encoder(prompt), batch(), contrast, 4, modules=body)
    assert_equal([prompt.grad], [twin.grad])


def test_a_partial_of_a_frozen_module_is_run_once():
    body, calls = frozen(), []
    body.register_forward_hook(lambda *_: calls.append(1))
    sk.chunked_backward([mlp(1), functools.partial(body)], batch(), contrast, 4)
    assert len(calls) == 3


@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_parameters_see_the_whole_gradient_once(before):
    """A hook clips gradients, another steps the optimizer as soon as a gradient is accumulated."""
    encoder, seen = mlp(), []
    twin = copy.deepcopy(encoder)
    for model in (encoder, twin):
        for p in model[0].parameters():
            p.register_hook(lambda grad: grad.clamp(-0.01, 0.01) + 0.1)
        for p in model[3].parameters():
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        if before:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
    one_pass(contrast, twin, batch())
    expected = sorted(g.norm().item() for g in seen)
    seen.clear()
    sk.chunked_backward(encoder, batch(), contrast, 4)
    assert_equal(gradients(encoder), gradients(twin))
    torch.testing.assert_close(sorted(g.norm().item() for g in seen), expected, rtol=1e-12, atol=0)
    seen.clear()
    one_pass(contrast, encoder, batch())  # the hooks are active again
    assert len(seen) == 2


def test_hooks_are_on_again_after_an_error():
    encoder, seen = mlp(), []
    encoder[0].weight.register_hook(seen.append)
    encoder[0].weight.grad = ones = torch.ones_like(encoder[0].weight)

    def backward(value):
        raise KeyError("no")

    with pytest.raises(KeyError):
        sk.chunked_backward(encoder, batch(), contrast, 4, backward=backward)
    assert encoder[0].weight.grad is ones
    one_pass(contrast, encoder, batch())
    assert len(seen) == 1


def test_views_in_one_tensor():
    encoder, views = mlp(), torch.stack(batch(num_views=3))
    twin = copy.deepcopy(encoder)
    want = one_pass(contrast, twin, views)
    got = sk.chunked_backward(encoder, views, contrast, 4)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(twin))


def test_gradient_reaches_a_tensor_of_views():
    encoder, views = mlp(), torch.stack(batch()).requires_grad_()
    twin = views.detach().clone().requires_grad_()
    one_pass(contrast, encoder, twin)
    sk.chunked_backward(encoder, views, contrast, 4)
    assert_equal([views.grad], [twin.grad])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encoders_of_another_dtype_than_the_inputs(dtype):
    """Scaled half-precision gradients have at most twice the error of one pass against float64."""

    class Cast(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(dtype))

    encoder, views = Cast(*mlp(dtype=dtype)), batch(dtype=torch.float32)
    twin, exact = copy.deepcopy(encoder), copy.deepcopy(encoder).double()
    criterion = sk.InfoNCELoss(0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(criterion([twin(x) for x in views])).backward()
    contrast_all = sk.InfoNCELoss(0.3, impl="reference")
    contrast_all([nn.Sequential.forward(exact, x.double()) for x in views]).backward()
    sk.chunked_backward(encoder, views, criterion, [4, 5], scaler=scaler)
    for got, one, want in zip(gradients(encoder), gradients(twin), gradients(exact), strict=True):
        assert got.dtype == dtype
        error, allowed = (g.double() / 256 - want for g in (got, one))
        assert error.norm() <= 2 * allowed.norm() + 4 * torch.finfo(dtype).eps * want.norm()
