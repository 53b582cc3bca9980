"""Test scalar arguments that are tensors of one element, DTensors, sharded parameters, or NumPy numbers."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_within, randn, run
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.compat import open_clip

VIEWS = randn(2, 8, 5, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_temperature_of_one_element(impl, shape):
    """The gradient has the shape of the parameter, and every objective sees the same number."""
    for objective in sk.OBJECTIVES:
        t = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        loss = sk.info_nce_loss(VIEWS, temperature=t, objective=objective, impl=impl)
        (grad,) = torch.autograd.grad(loss, t)
        want, _, want_grad = run(spec.info_nce_loss, VIEWS, 0.3, objective=objective)
        assert loss.shape == ()
        assert grad.shape == shape
        assert_within("loss", loss, want)
        assert_within("temperature", grad.sum(), want_grad)


def test_temperature_of_one_element_compiles(impl):
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: sk.info_nce_loss(VIEWS, temperature=t, impl=impl), fullgraph=True, backend="aot_eager"
    )
    (got,), (want,) = (
        torch.autograd.grad(f(t), t) for f in (compiled, lambda t: sk.info_nce_loss(VIEWS, temperature=t))
    )
    torch._dynamo.reset()
    assert got.shape == (1,)
    assert_within("temperature", got, want)


def test_drop_in_takes_a_scale_of_one_element():
    scale = torch.tensor([math.log(8.0)], dtype=torch.float64, requires_grad=True)
    losses = [open_clip.ClipLoss()(*VIEWS, s.exp()) for s in (scale, scale.reshape(()))]
    assert torch.equal(*losses)
    assert torch.autograd.grad(losses[0], scale)[0].shape == (1,)


def test_old_and_new_state_dicts():
    """States load in both directions between the parameter's old shape () and its new shape (1,)."""
    old = nn.Sequential(sk.InfoNCELoss(0.2, learnable_temperature=True))
    old[0].logit_scale = nn.Parameter(torch.tensor(math.log(7.0)))
    new = nn.Sequential(sk.InfoNCELoss(0.5, learnable_temperature=True, max_scale=50.0))
    new.load_state_dict(old.state_dict())
    assert new[0].logit_scale.shape == (1,)
    assert new[0].temperature.item() == pytest.approx(1 / 7)
    with torch.no_grad():
        new[0].logit_scale.fill_(math.log(3.0))
    old.load_state_dict(new.state_dict())
    assert old[0].logit_scale.shape == ()
    for module in (old[0], new[0]):
        assert module.temperature.shape == ()
        assert module.temperature.item() == pytest.approx(1 / 3)
        loss = module.double()(VIEWS)
        loss.backward()
        assert module.logit_scale.grad.shape == module.logit_scale.shape
        assert loss.item() == pytest.approx(sk.info_nce_loss(VIEWS, temperature=1 / 3).item(), rel=1e-6)
    wrong = {"0.logit_scale": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        new.load_state_dict(wrong)


class Model(nn.Module):
    """A network with its loss."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(5, 4)
        self.loss = sk.InfoNCELoss(0.2, learnable_temperature=True, max_scale=20.0, group=group)

    def forward(self, views):
        return self.loss([self.network(x) for x in views])


def sharded(group, views, own_shard):
    """Train three steps with FSDP2; return the losses, the full parameters, and the repr of the loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = Model("world").double()
    if own_shard:  # FSDP2 requires one dtype per group, so a separately sharded loss may have another dtype
        model.loss.float()
        fully_shard(model.loss, mesh=mesh)
    fully_shard(model, mesh=mesh)
    text = repr(model.loss)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(views.chunk(2, 1)[dist.get_rank()])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().full_tensor() for p in model.parameters()], text


@pytest.mark.parametrize("own_shard", [False, True])
def test_fully_shard_trains_as_one_process(ranks, own_shard):
    alone = Model("local").double()
    optimizer = torch.optim.SGD(alone.parameters(), 0.5)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = alone(VIEWS)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert alone.loss.temperature.item() != pytest.approx(0.2, abs=1e-3)
    for losses, parameters, text in ranks.run(2, sharded, VIEWS, own_shard):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert "learnable_temperature=True" in text  # repr does not communicate
        for got, want in zip(parameters, alone.parameters(), strict=True):
            torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-7)


def spread(group, views, replicated):
    """Return the loss and the gradient of a DTensor temperature: the mean over the processes, as in FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    value = torch.tensor([0.3], dtype=torch.float64)
    t = nn.Parameter(distribute_tensor(value, mesh, [Replicate() if replicated else Shard(0)]))
    mine = views.chunk(2, 1)[dist.get_rank()]
    loss = sk.info_nce_loss(mine, temperature=t, group="local")
    loss.backward()
    assert type(loss) is torch.Tensor
    return loss.item(), t.grad.full_tensor()


@pytest.mark.parametrize("replicated", [True, False])
def test_temperature_that_is_a_dtensor(ranks, replicated):
    want = [run(spec.info_nce_loss, part, 0.3) for part in VIEWS.chunk(2, 1)]
    results = ranks.run(2, spread, VIEWS, replicated)
    for (loss, grad), (want_loss, _, _) in zip(results, want, strict=True):
        assert loss == pytest.approx(want_loss.item(), rel=1e-12)
        assert grad.shape == (1,)
        assert_within("temperature", grad[0], (want[0][2] + want[1][2]) / 2)


def refused(group):
    """Assert that views, labels and a queue that are DTensors raise, and that the message names them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    views = distribute_tensor(VIEWS, mesh, [Shard(1)])
    rows = distribute_tensor(VIEWS[0], mesh, [Replicate()])
    for name, call in (
        ("views", lambda: sk.info_nce_loss(views)),
        ("views", lambda: sk.info_nce_loss([rows, rows])),
        ("views", lambda: sk.contrastive_stats(views)),
        ("labels", lambda: sk.info_nce_loss(VIEWS, labels=distribute_tensor(torch.arange(8), mesh, [Shard(0)]))),
        ("queue", lambda: sk.info_nce_loss(VIEWS, queue=rows)),
        ("predictions", lambda: sk.byol_loss(views, VIEWS)),
        ("targets", lambda: sk.byol_loss(VIEWS, views)),
    ):
        with pytest.raises(TypeError, match=rf"^{name}.*: expected a plain tensor, got a DTensor; pass its to_local"):
            call()


def test_views_that_are_dtensors_are_refused(ranks):
    ranks.run(2, refused)


NUMBERS = [np.float64(0.25), np.float32(0.25), np.float16(0.25)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_numbers_of_numpy(impl, number):
    assert torch.equal(sk.info_nce_loss(VIEWS, temperature=number), sk.info_nce_loss(VIEWS, temperature=0.25))
    assert torch.equal(sk.byol_loss(VIEWS, VIEWS, eps=number), sk.byol_loss(VIEWS, VIEWS, eps=0.25))
    assert sk.contrastive_stats(VIEWS, eps=number) == sk.contrastive_stats(VIEWS, eps=0.25)
    module = sk.InfoNCELoss(number, learnable_temperature=True, max_scale=np.float32(8))
    assert module.temperature.item() == 0.25
    assert type(sk.InfoNCELoss(number).temperature) is float
    assert sk.BYOLLoss(eps=number).eps == 0.25


@pytest.mark.parametrize("number", [np.int64(1), np.int32(1), np.uint8(1)], ids=lambda n: type(n).__name__)
def test_integers_of_numpy(impl, number):
    views = randn(3, 6, 5)
    want = sk.info_nce_loss(views, core_view=1)
    assert torch.equal(sk.info_nce_loss(views, core_view=number), want)
    assert torch.equal(sk.InfoNCELoss(core_view=number)(views), want)
    assert torch.equal(sk.info_nce_loss(views, temperature=number), sk.info_nce_loss(views, temperature=1))
    method = sk.methods.MoCo(nn.Linear(5, 4), nn.Identity(), queue_size=number * 3, dim=number * 4)
    assert method.queue.shape == (3, 4)
    both = sk.methods.BYOLContrast(*(nn.Linear(4, 4) for _ in range(3)), byol_weight=number, contrast_weight=number)
    assert (both.byol_weight, both.contrast_weight) == (1.0, 1.0)


@pytest.mark.parametrize("value", [True, np.True_, "0.1", np.str_("0.1"), np.array([0.1, 0.2]), 1j, None])
def test_values_that_are_not_numbers_raise(value):
    for name, call in (
        ("temperature", lambda: sk.info_nce_loss(VIEWS, temperature=value)),
        ("eps", lambda: sk.byol_loss(VIEWS, VIEWS, eps=value)),
        ("temperature", lambda: sk.InfoNCELoss(value)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a number, got {type(value).__name__}"):
            call()


@pytest.mark.parametrize("value", [True, np.True_, np.float32(1), "1"])
def test_values_that_are_not_integers_raise(value):
    for name, call in (
        ("core_view", lambda: sk.info_nce_loss(VIEWS, core_view=value)),
        ("core_view", lambda: sk.InfoNCELoss(core_view=value)),
        ("queue_size", lambda: sk.methods.MoCo(nn.Linear(5, 4), nn.Identity(), queue_size=value)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected .*an integer"):
            call()


def test_meta_and_copies_have_a_repr():
    module = sk.InfoNCELoss(0.2, learnable_temperature=True)
    assert "temperature=0.2," in repr(copy.deepcopy(module))
    assert "learnable_temperature=True" in repr(module.to("meta"))
