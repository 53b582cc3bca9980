"""Values of ``group=``, when it is looked up, and the warning of a loss without a group among several processes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import assert_within, randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.compat import (
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    simcse,
    solo,
    supcontrast,
)
from selfsup_kernels.core import validate

VIEWS = randn(2, 10, 5, dtype=torch.float64)
SIZES = (7, 3)


def own(tensor, dim=1):
    return tensor.split(SIZES, dim)[dist.get_rank()]


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(5, 5).double()


METHODS = {
    "InfoNCELoss": lambda group: sk.InfoNCELoss(0.3, group=group),
    "SigLIPLoss": lambda group: sk.SigLIPLoss(group=group),
    "SimCLR": lambda group: sk.methods.SimCLR(linear(0), nn.Identity(), group=group),
    "CMC": lambda group: sk.methods.CMC(linear(0), nn.Identity(), group=group),
    "MoCo": lambda group: sk.methods.MoCo(linear(0), nn.Identity(), 12, dim=5, group=group).double(),
    "SigLIP": lambda group: sk.methods.SigLIP(linear(0), linear(1), group=group).double(),
    "BYOLContrast": lambda group: sk.methods.BYOLContrast(linear(0), nn.Identity(), linear(1), group=group),
}
"""Built in the main process, where there is no group, and run in two processes."""


def loss_and_gradient(module, views):
    leaf = views.clone().requires_grad_()
    loss = module(*leaf)
    loss.backward()
    return loss.detach(), leaf.grad, [b.clone() for b in module.buffers()]


def world_and_group(group, module):
    """Return the results of a module with ``group="world"`` and of one that holds the group itself."""
    module, other = copy.deepcopy(module), copy.deepcopy(module)  # the ranks share the memory of arguments
    for part in (other, *other.modules()):
        if hasattr(part, "group"):
            part.group = group
    return [loss_and_gradient(m, own(VIEWS)) for m in (module, other)]


@pytest.mark.parametrize("method", METHODS)
def test_world_is_looked_up_in_the_call(ranks, method):
    module = METHODS[method]("world")
    whole, whole_grad, buffers = loss_and_gradient(copy.deepcopy(module), VIEWS)  # one process with all samples
    results = ranks.run(2, world_and_group, pickle.loads(pickle.dumps(module)))
    for ours, held in results:
        assert_within("loss", ours[0], whole)
        for name, a, b in zip(("loss", "gradient"), ours[:2], held[:2], strict=True):
            assert torch.equal(a, b), name
        for a, b in zip(ours[2], held[2], strict=True):
            assert torch.equal(a, b)
    if method != "MoCo":  # its queue holds the keys rank by rank, not view by view
        for buffer, *each in zip(buffers, *(r[0][2] for r in results), strict=True):
            assert all(torch.equal(buffer, other) for other in each)
    assert_within("gradient", torch.cat([r[0][1] for r in results], 1) / 2, whole_grad)


def functional(group):
    return sk.info_nce_loss(own(VIEWS), group="world").item(), simcse.unsupervised_loss(
        *own(VIEWS), group="world"
    ).item()


def test_world_in_functions(ranks):
    want = spec.info_nce_loss(VIEWS, temperature=0.1).item()
    one_way = spec.info_nce_loss(VIEWS, temperature=0.05, objective="cross_view", reduction="none")[0]
    for (loss, drop_in), part in zip(ranks.run(2, functional), one_way.split(SIZES), strict=True):
        assert loss == pytest.approx(want, rel=1e-12)
        assert drop_in == pytest.approx(part.mean().item(), rel=1e-9)


@pytest.mark.parametrize("group", ["world", "local", None])
def test_one_process_is_the_world(group):
    assert torch.equal(sk.info_nce_loss(VIEWS, group=group), sk.info_nce_loss(VIEWS))
    compiled = torch.compile(lambda x: sk.info_nce_loss(x, group=group), fullgraph=True, backend="eager")
    assert torch.equal(compiled(VIEWS), sk.info_nce_loss(VIEWS))


def caught(call, times=2):
    """Return the warnings of several calls in a process that has not warned yet."""
    validate._warned.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    return [str(w.message) for w in found]


def warned(group, module):
    return caught(lambda: module(*own(VIEWS)))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_without_a_group_warns_once_and_local_does_not(ranks, method):
    for found in ranks.run(2, warned, METHODS[method](None)):
        assert len(found) == 1
        assert found[0].startswith("selfsup_kernels: 2 processes run, and this loss has no group")
        assert "group='world'" in found[0]
        assert "group='local'" in found[0]
    for group in ("local", "world"):
        assert ranks.run(2, warned, METHODS[method](group)) == [[], []]


def local_values(group):
    """Return losses without a group and with "local"; both use only the process's own samples."""
    module = sk.InfoNCELoss(group="local")
    return sk.info_nce_loss(own(VIEWS)).item(), module(own(VIEWS)).item()


def test_local_uses_only_the_own_samples(ranks):
    for values, part in zip(ranks.run(2, local_values), VIEWS.split(SIZES, 1), strict=True):
        assert values == pytest.approx([spec.info_nce_loss(part, temperature=0.1).item()] * 2, rel=1e-12)


LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0, 1, 0])


def drop_ins(group):
    """Return the warnings of drop-ins whose originals use the samples of one process."""
    x, y = VIEWS
    calls = {
        "supcontrast": lambda: supcontrast.SupConLoss()(VIEWS.transpose(0, 1)),
        "NTXentLoss": lambda: pytorch_metric_learning.NTXentLoss()(x, LABELS),
        "SupConLoss": lambda: pytorch_metric_learning.SupConLoss()(x, LABELS),
        "ClipLoss": lambda: open_clip.ClipLoss()(x, y, 3.0),
        "lightly": lambda: lightly.NTXentLoss()(x, y),
        "bank": lambda: lightly.NTXentLoss(memory_bank_size=(4, 5))(x, y),
        "DCLLoss": lambda: lightly.DCLLoss()(x, y),
        "solo": lambda: solo.simclr_loss_func(x, y),
        "mnrl": lambda: sentence_transformers.multiple_negatives_ranking_loss([x, y]),
    }
    return {name: found for name, call in calls.items() if (found := caught(call))}


def test_drop_ins_of_local_losses_do_not_warn(ranks):
    assert ranks.run(1, drop_ins) == [{}]


def transformed(group):
    with pytest.raises(RuntimeError, match=r"^group: .*torch\.func"):
        torch.func.grad(lambda x: sk.info_nce_loss(x, group="world"))(own(VIEWS))
    return torch.func.grad(lambda x: sk.info_nce_loss(x, group="local"))(own(VIEWS))


def test_torch_func(ranks):
    for got, part in zip(ranks.run(2, transformed), VIEWS.split(SIZES, 1), strict=True):
        assert_within("gradient", got, torch.func.grad(spec.info_nce_loss)(part))


def compiled(group, name):
    leaf = own(VIEWS).clone().requires_grad_()
    loss = torch.compile(lambda x: sk.info_nce_loss(2 * x, group=name) + 1, backend="eager")(leaf)
    loss.backward()
    return loss.item() - 1, leaf.grad


@pytest.mark.parametrize("name", ["world", "local", None])
def test_a_compiled_caller(ranks, name):
    whole = VIEWS.clone().requires_grad_()
    parts = [whole] if name == "world" else whole.split(SIZES, 1)
    losses = [spec.info_nce_loss(part, temperature=0.1) for part in parts]
    (grad,) = torch.autograd.grad(sum(losses), whole)
    results = ranks.run(2, compiled, name)
    for (loss, _), want in zip(results, losses * (3 - len(losses)), strict=True):
        assert loss == pytest.approx(want.item(), rel=1e-12)
    assert_within("gradient", torch.cat([g for _, g in results], 1) / (2 if name == "world" else 1), grad)


def shown(group):
    return repr(sk.InfoNCELoss(group=group)), repr(METHODS["MoCo"](group))


def test_repr_shows_the_group(ranks):
    for group in ("world", "local", None):
        for method in METHODS.values():
            assert f"group={group!r}" in repr(method(group))
    for texts in ranks.run(2, shown):
        assert all("group=ProcessGroup of 2" in text for text in texts)
