"""A model and its average, for the tests of updates after changes."""

import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import backends

M = 0.75


class Model(nn.Module):
    """A model with running statistics, an unsaved buffer, a complex one, an empty one, and an empty parameter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(4, 4)
        self.b = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("nothing", torch.ones(0))


def values(module):
    return {
        k.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): v.detach().clone()
        for k, v in (*module.named_parameters(), *module.named_buffers())
    }


def averages(before, model, buffers="copy"):
    """The averages of ``before`` and the model in float64, by name."""
    averaged = {id(x) for x in (*model.parameters(), *(model.buffers() if buffers == "average" else ()))}
    want = {}
    for name, source in (*model.named_parameters(), *model.named_buffers()):
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        old, new = before[name].double(), source.detach().double()
        if id(source) in averaged and source.is_floating_point():
            want[name] = M * old + (1 - M) * new
        else:
            want[name] = old if buffers == "ignore" or old.shape != new.shape else new
    return want


def assert_update(ema, model):
    before = values(ema.module)
    want = averages(before, model, ema.buffer_policy)
    ema.update()
    got = values(ema.module)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def move(model, seed):
    for i, x in enumerate((*model.parameters(), *model.buffers())):
        x.add_(randn(*x.shape, seed=seed + i) if x.is_floating_point() else 1)


def settled(impl, **options):
    """A model and its EMA after two updates: the second one has found its tensors without a walk."""
    model = Model()
    ema = sk.EMA(model, M, impl=impl, **options)
    for seed in (1, 2):
        move(model, 100 * seed)
        assert_update(ema, model)
    if backends.unavailable("cpu") is None:
        assert ema._kept.pairs(ema) is not None
    return model, ema


def freed(tensor):
    tensor.untyped_storage().resize_(0)
