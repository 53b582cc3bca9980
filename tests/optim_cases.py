"""Shared code of the fused optimizers' tests, on the CPU and on a GPU: models, comparison with torch.optim, bounds."""

import copy

import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk

SHAPES = [(7,), (3, 5), (), (0, 4), (1031,), (2, 3, 4, 5), (5000,)]
SGD_CASES = {
    "plain": {"lr": 0.1},
    "decay": {"lr": 0.1, "weight_decay": 0.02},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "maximize": {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.02},
}
ADAMW_CASES = {
    "defaults": {},
    "other": {"lr": 0.03, "betas": (0.3, 0.99), "eps": 1e-3, "weight_decay": 0.2},
    "no decay": {"lr": 0.01, "weight_decay": 0.0},
    "maximize": {"lr": 0.01, "maximize": True},
}
CASES = [(sk.optim.SGD, torch.optim.SGD, case) for case in SGD_CASES.values()]
CASES += [(sk.optim.AdamW, torch.optim.AdamW, case) for case in ADAMW_CASES.values()]
CASE_IDS = [*(f"SGD {name}" for name in SGD_CASES), *(f"AdamW {name}" for name in ADAMW_CASES)]


class Weights(nn.Module):
    """A model with parameters of many shapes, one of them channels_last, and buffers."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(randn(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes))
        for p in self.weights:
            if p.dim() == 4:
                p.data = p.data.to(memory_format=torch.channels_last)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def set_grads(model, step):
    """Set gradients that are the same for every dtype and device, up to rounding."""
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, dtype=p.dtype, seed=1000 * step + i).to(p.device)


def average_of(model, **arguments):
    """Return an EMA whose target differs from the model; it gives no warning for low precision."""
    arguments = {"momentum": 0.7, "dtype": torch.float32} | arguments
    ema = sk.EMA(model, **arguments)
    for i, p in enumerate(ema.module.parameters()):
        p.copy_(randn(*p.shape, dtype=p.dtype, seed=500 + i))
    return ema


def distance(got, want):
    return max(((g.double() - w.double()).norm().item() for g, w in zip(got, want, strict=True)), default=0.0)


def compare(impl, device, ours, theirs, arguments, dtype, target_dtype, steps=4, **ema_arguments):
    """Check that parameters and state are as close to float64 as torch's own, and that the target equals
    ``ema_update_``'s."""
    model = Weights(dtype).to(device)
    eager, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    # The truth is torch's optimizer in float64, from the same numbers.
    truth = theirs(wide.parameters(), **arguments)
    yardstick = theirs(eager.parameters(), foreach=False, **arguments)
    ema = average_of(model, dtype=target_dtype, impl=impl, **ema_arguments)
    optimizer = ours(model.parameters(), ema=ema, impl=impl, **arguments)
    info = torch.finfo(dtype)
    for step in range(steps):
        for m in (model, eager):
            set_grads(m, step)
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.double()
        before = [t.clone() for t in ema.module.parameters()]
        for o in (truth, yardstick, optimizer):
            o.step()
        pairs = [
            (list(model.parameters()), list(eager.parameters()), list(wide.parameters())),
            *(zip_states(optimizer, yardstick, truth, model, eager, wide)),
        ]
        for got, own, want in pairs:
            size = max(w.norm().item() for w in want)
            allowed = 1e-12 * size if dtype == torch.float64 else 2 * distance(own, want) + 4 * info.eps * size
            assert distance(got, want) <= allowed
            assert all(g.dtype == dtype and g.stride() == p.stride() for g, p in zip(got, pairs[0][0], strict=True))
        sk.ema_update_(before, list(model.parameters()), ema.momentum, impl="reference")
        eps = torch.finfo(target_dtype or dtype).eps
        for got, want in zip(ema.module.parameters(), before, strict=True):
            torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)


def zip_states(*optimizers_and_models):
    half = len(optimizers_and_models) // 2
    lists = []
    for o, m in zip(optimizers_and_models[:half], optimizers_and_models[half:], strict=True):
        names = sorted({name for p in m.parameters() for name in o.state[p]} - {"step"})
        names = [n for n in names if all(o.state[p].get(n) is not None for p in m.parameters())]
        lists.append({name: [o.state[p][name] for p in m.parameters()] for name in names})
    assert len({tuple(x) for x in lists}) == 1, "states of other names than torch's"
    return [tuple(x[name] for x in lists) for name in lists[0]]
