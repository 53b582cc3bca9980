"""The moving average where ``s - t`` is not finite: infinite masks, overflow, and values that must not change.

The equation is ``m t + (1 - m) s``, and the kernels compute ``t + (1 - m) (s - t)``.
"""

import math

import extremes
import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]


@pytest.mark.sanitize
@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_every_pair_of_extreme_numbers(impl, target_dtype, source_dtype):
    for momentum in extremes.MOMENTA:
        extremes.check(impl, target_dtype, source_dtype, momentum)
        extremes.check(impl, target_dtype, source_dtype, torch.tensor(momentum, dtype=torch.float64))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_extreme_numbers_rounded_at_random(impl, dtype):
    for momentum in extremes.MOMENTA:
        extremes.check(impl, dtype, torch.float32, momentum, stochastic_rounding=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_dense_equation(dtype):
    for momentum in extremes.MOMENTA:
        target, source = extremes.pairs(dtype, dtype)
        want = [extremes.mean(*x, momentum) for x in zip(target.tolist(), source.tolist(), strict=True)]
        spec.ema_update_([target], [source], momentum)
        torch.testing.assert_close(target, torch.tensor(want, dtype=torch.float64).to(dtype), equal_nan=True)


@pytest.mark.parametrize("source_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATING, ids=str)
def test_an_infinity_changes_no_bits_of_its_neighbours(impl, target_dtype, source_dtype):
    """The neighbours include zeros and subnormal numbers."""
    n = 300
    target, source = randn(n, dtype=target_dtype), randn(n, dtype=source_dtype, seed=1)
    target[::7], source[::7] = -0.0, -0.0
    target[3::17], source[5::17] = torch.finfo(target_dtype).tiny / 2, -torch.finfo(source_dtype).tiny / 2
    for momentum in (0.3, 0.996):
        for seed in (None, 5):
            for place in (0, 8, 17, 63, 64, 200, n - 1):
                results = []
                for value in (None, math.inf):
                    t, s = target.clone(), source.clone()
                    if value is not None:
                        t[place] = s[place] = value
                    arguments = {}
                    if seed is not None:
                        if target_dtype not in LOW:
                            continue
                        arguments = {"stochastic_rounding": True, "generator": torch.Generator().manual_seed(seed)}
                    sk.ema_update_([t], [s], momentum, impl=impl, **arguments)
                    results.append(t)
                if results:
                    assert results[1][place] == math.inf
                    others = torch.arange(n) != place
                    assert torch.equal(*(bits(x)[others] for x in results))


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finite_results_are_those_of_torchs_lerp(dtype):
    """The eager reference gives the same bits."""
    target, source = extremes.pairs(dtype, dtype)
    target, source = torch.cat([target, randn(500, dtype=dtype)]), torch.cat([source, randn(500, dtype=dtype, seed=1)])
    for momentum in extremes.MOMENTA:
        want = torch.lerp(target, source, 1 - momentum)
        got = target.clone()
        sk.ema_update_([got], [source], momentum, impl="reference")
        assert torch.equal(bits(got)[want.isfinite()], bits(want)[want.isfinite()])


class Masked(nn.Module):
    """A causal mask of minus infinity that is never trained."""

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        mask = torch.full((40, 40), -math.inf).triu(1)
        if kind == "buffer":
            self.register_buffer("mask", mask)
        else:
            self.mask = nn.Parameter(mask, requires_grad=kind == "trained")


@pytest.mark.parametrize("kind", ["frozen", "buffer"])
def test_a_mask_in_a_momentum_encoder(impl, kind):
    model = Masked(kind)
    want = model.mask.detach().clone()
    ema = sk.EMA(model, 0.99, buffers="average", impl=impl)
    for momentum in (None, 0.0, 0.3, 1.0, torch.tensor(0.7)):
        ema.update(momentum)
        assert torch.equal(ema.module.mask, want)


OPTIMIZERS = [
    (sk.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (sk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (sk.optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "eps": 1e-3}),
    (sk.optim.LARS, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
]
IDS = ["SGD", "Nesterov", "AdamW", "LARS"]


@pytest.mark.parametrize("kind", ["frozen", "trained", "buffer"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "arguments"), OPTIMIZERS, ids=IDS)
def test_a_mask_in_an_optimizer(impl, ours, theirs, arguments, dtype, kind):
    """The mask is trained with a gradient of 0 and without weight decay."""
    models = [Masked(kind).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    want = models[0].mask.detach().clone()
    ema = sk.EMA(models[0], 0.99, buffers="average", dtype=torch.float32, impl=impl)
    optimizers = [
        ours(models[0].parameters(), ema=ema, impl=impl, **arguments),
        theirs(models[1].parameters(), **arguments),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
            assert torch.equal(model.mask, want)
        assert torch.equal(ema.module.mask, want.float())
