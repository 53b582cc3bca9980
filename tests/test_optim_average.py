"""The average of a fused step: it takes only parameters that are final, or raises.

A sharded optimizer steps a part of the parameters in each process and broadcasts them afterwards; with two optimizers
over one model, one steps first. An average taken before the last change would be one step behind.
"""

import copy

import pytest
import torch
from helpers import randn
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import selfsup_kernels as sk

OURS = {"SGD": sk.optim.SGD, "LARS": sk.optim.LARS, "AdamW": sk.optim.AdamW}
REFUSED = "ema: expected a model whose parameters with a gradient are all of this optimizer"


def network():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=i)
    return model


def backward(model, step=0):
    model.zero_grad()
    model(randn(5, 3, seed=10 + step)).square().sum().backward()


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def sharded_with_an_average(group, name, bucket_view):
    """Return the errors of two steps, and whether any parameter or average has changed."""
    model = network()
    ema = sk.EMA(model, 0.9)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        OURS[name],
        process_group=group,
        parameters_as_bucket_view=bucket_view,
        lr=0.1,
        ema=ema,
    )
    before, errors = values(model) + values(ema), []
    for step in range(2):
        backward(model, step)
        try:
            optimizer.step()
        except ValueError as error:
            errors.append(str(error))
    return errors, all(map(torch.equal, before, values(model) + values(ema)))


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_a_sharded_optimizer_is_refused(ranks, name, bucket_view):
    """It raises on every process, before anything is written or sent."""
    for errors, unchanged in ranks.run(2, sharded_with_an_average, name, bucket_view):
        assert len(errors) == 2
        for error in errors:
            assert error.startswith(REFUSED)
            assert "ZeroRedundancyOptimizer" in error
            assert "ema.update() after the last step" in error
        assert unchanged


def sharded_and_updated(group, name):
    model = network()
    ema = sk.EMA(model, 0.9)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), OURS[name], process_group=group, lr=0.1)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        ema.update()
    return values(model), values(ema)


@pytest.mark.parametrize("name", OURS)
def test_the_alternative_that_the_error_suggests_is_right(ranks, name):
    """It gives the same as one process with the fused average."""
    model = network()
    ema = sk.EMA(model, 0.9)
    optimizer = OURS[name](model.parameters(), lr=0.1, ema=ema)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    for parameters, average in ranks.run(2, sharded_and_updated, name):
        for got, want in zip(parameters + average, values(model) + values(ema), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
def test_two_optimizers_over_one_model(impl, ours):
    model = network()
    ema = sk.EMA(model, 0.9, impl=impl)
    first = ours(model[0].parameters(), lr=0.1, ema=ema, impl=impl)
    backward(model)
    before = values(model) + values(ema)
    with pytest.raises(ValueError, match=rf"{REFUSED}, but it lacks 2 of them \(1\.weight, 1\.bias\)"):
        first.step()
    assert all(map(torch.equal, before, values(model) + values(ema)))
    assert not any(first.state.values())
    # Nor for a compiled or wrapped model, whose parameters have longer names.
    ema = sk.EMA(nn.DataParallel(model), 0.9, impl=impl)
    with pytest.raises(ValueError, match=REFUSED):
        ours(model[0].parameters(), lr=0.1, ema=ema, impl=impl).step()


def test_the_error_counts_the_other_parameters(impl):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    optimizer = sk.optim.SGD(model[0].parameters(), ema=sk.EMA(model, impl=impl), impl=impl)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"lacks 8 of them \(1\.weight, 1\.bias, 2\.weight, \.\.\.\)"):
        optimizer.step()


class EverySecondStep:
    """A wrapper that steps half of the parameters at a time, like block-wise training."""

    def __init__(self, halves, **arguments):
        self.optimizers = [sk.optim.SGD(half, lr=0.1, **arguments) for half in halves]
        self.count = 0

    def step(self):
        self.optimizers[self.count % 2].step()
        self.count += 1


def test_a_wrapper_that_steps_a_part(impl):
    """It raises if all parameters have gradients. If only the stepped part has, all other parameters are averaged."""
    model = network()
    ema = sk.EMA(model, 0.9, impl=impl)
    wrapper = EverySecondStep([list(part.parameters()) for part in model], ema=ema, impl=impl)
    backward(model)
    with pytest.raises(ValueError, match=REFUSED):
        wrapper.step()
    want = [p.double() for p in values(ema)]
    for step in range(4):
        backward(model, step)
        model[(wrapper.count + 1) % 2].zero_grad()
        wrapper.step()
        want = [0.9 * w + 0.1 * p.double() for w, p in zip(want, values(model), strict=True)]
        for got, expected in zip(values(ema), want, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_parameters_that_no_step_will_change_are_averaged(impl):
    """These are frozen parameters, unused parameters, and groups that are added later."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    ema = sk.EMA(model, 0.5, impl=impl)
    twin = copy.deepcopy(ema.module)
    optimizer = sk.optim.SGD([model["a"].weight], lr=0.1, ema=ema, impl=impl)
    model["a"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"lacks 1 of them \(a\.bias\)"):
        optimizer.step()
    optimizer.add_param_group({"params": [model["a"].bias]})
    for p in model.parameters():
        p.data += 1.0
    optimizer.step()
    sk.ema_update_(list(twin.parameters()), list(model.parameters()), 0.5, impl=impl)
    for got, want in zip(values(ema.module), values(twin), strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_from_before_a_part_was_frozen(impl):
    """Leftover gradients of frozen parameters do not prevent their average."""
    model = network()
    ema = sk.EMA(model, 0.5, impl=impl)
    backward(model)
    model[0].requires_grad_(False)
    before = values(model)
    for p in model[0].parameters():
        p.data += 1.0
    sk.optim.SGD(model[1].parameters(), lr=0.1, ema=ema, impl=impl).step()
    for got, old, new in zip(values(ema), before, values(model), strict=True):
        torch.testing.assert_close(got, (old + new) / 2)
