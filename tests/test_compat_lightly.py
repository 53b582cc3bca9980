"""compat.lightly against the originals' formulas in float64; tests/interop compares with the originals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32_BOUND, assert_within, randn
from torch import nn

from selfsup_kernels.compat import lightly


def two_views(batch=21, dim=17, dtype=torch.float64, seed=0):
    base = randn(batch, dim, dtype=torch.float64, seed=seed) + 0.4
    return [
        ((1 + i) * base + (0.3 + i) * randn(batch, dim, dtype=torch.float64, seed=seed + i + 1)).to(dtype)
        for i in range(2)
    ]


def ntxent(out0, out1, temperature):
    z = F.normalize(torch.cat([out0, out1]), dim=1)
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(out0)))


def bank_loss(out0, out1, bank, temperature):
    z0, z1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    scores = torch.cat([(z0 * z1).sum(1, keepdim=True), z0 @ bank.to(z0.dtype).T], 1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(z0), dtype=torch.long))


def dcl(out0, out1, temperature, weight_fn=None):
    z = [F.normalize(x, dim=1) for x in (out0, out1)]
    total, same = 0, torch.eye(len(out0), dtype=torch.bool)
    for a, b in (z, z[::-1]):
        positive = (a * b).sum(1) / temperature * (weight_fn(a, b) if weight_fn else 1)
        negative = torch.cat([a @ a.T, a @ b.T], 1) / temperature
        total = total + (negative.masked_fill(same.repeat(1, 2), -torch.inf).logsumexp(1) - positive).mean()
    return total / 2


def gradients(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def compare(ours, formula, inputs):
    """Compare values and gradients in float64, and in float32 with at most twice the formula's error."""
    low = [x.float() for x in inputs]
    truth = gradients(formula, inputs)
    for i, want in enumerate(truth):
        assert_within(f"{i}", gradients(ours, inputs)[i], want)
    truth = gradients(formula, [x.double() for x in low])
    for i, want in enumerate(truth):
        got, eager = gradients(ours, low)[i], gradients(formula, low)[i]
        assert got.dtype == torch.float32
        assert_within(f"{i}", got, want, eager)


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_ntxent(temperature):
    compare(lightly.NTXentLoss(temperature), lambda a, b: ntxent(a, b, temperature), two_views())


def squared_distance(a, b):
    return 0.3 * ((a - 2 * b) ** 2).sum(1)


@pytest.mark.parametrize("weight_fn", [None, squared_distance])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_dcl(temperature, weight_fn):
    compare(lightly.DCLLoss(temperature, weight_fn), lambda a, b: dcl(a, b, temperature, weight_fn), two_views())


def test_dclw():
    def weights(a, b):
        return 2 - len(a) * torch.softmax((a * b).sum(1) / 0.3, 0).detach()

    compare(lightly.DCLWLoss(0.2, sigma=0.3), lambda a, b: dcl(a, b, 0.2, weights), two_views())


def test_negative_cosine():
    inputs = two_views()
    compare(lightly.NegativeCosineSimilarity(), lambda a, b: -F.cosine_similarity(a, b, 1).mean(), inputs)
    compare(lightly.NegativeCosineSimilarity(dim=0), lambda a, b: -F.cosine_similarity(a, b, 0).mean(), inputs)
    detached = [inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()]
    lightly.NegativeCosineSimilarity()(detached[0], detached[1].detach()).backward()
    assert detached[1].grad is None
    assert_within(
        "gradient", detached[0].grad, gradients(lambda a: -F.cosine_similarity(a, inputs[1]).mean(), inputs[:1])[1]
    )


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("batch", [1, 2, 21])
@pytest.mark.parametrize("length", [1, 12])  # at 12, losses above 88, where exp overflows float32
def test_memory_bank_loss(temperature, batch, length):
    criterion = lightly.NTXentLoss(temperature, memory_bank_size=(40, 17)).double()
    bank = length * F.normalize(criterion.memory_bank.bank, dim=1)  # the loss does not normalise its rows

    def ours(a, b):
        criterion.memory_bank.bank.copy_(bank)  # undo the previous call's update
        return criterion(a, b)

    compare(ours, lambda a, b: bank_loss(a, b, bank.to(a.dtype), temperature), two_views(batch))


def test_memory_bank_truncates_a_batch_at_its_end():
    criterion = lightly.NTXentLoss(memory_bank_size=(8, 3))
    expected, pointer = criterion.memory_bank.bank.clone(), 0
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(8))
    for step, batch in enumerate([3, 3, 3, 8, 2, 20, 1]):
        out0, out1 = two_views(batch, 3, torch.float32, seed=10 * step)
        before = criterion(out0, out1)  # no gradient: the bank does not change
        loss = criterion(out0.requires_grad_(), out1)
        assert_within("before the rows enter", loss.detach(), bank_loss(out0, out1, expected, 0.5).detach())
        assert torch.equal(loss.detach(), before)
        free = 8 - pointer
        expected[pointer : pointer + batch] = F.normalize(out1, dim=1)[:free]
        pointer = 0 if batch >= free else pointer + batch
        assert torch.equal(criterion.memory_bank.bank, expected)
        assert criterion.memory_bank.bank_ptr.tolist() == [pointer]
        loss.backward()  # after the bank has changed
        assert out0.grad.isfinite().all()


def test_memory_bank_has_no_state_and_is_copied():
    criterion = lightly.NTXentLoss(0.3, memory_bank_size=(8, 3))
    assert criterion.state_dict() == {}
    assert [name for name, _ in criterion.named_buffers()] == ["memory_bank.bank", "memory_bank.bank_ptr"]
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other.memory_bank.bank, criterion.memory_bank.bank)
    module = lightly.MemoryBankModule((8, 3))
    output, bank = module(torch.ones(2, 3), update=True)
    assert bank.shape == (3, 8)
    assert torch.equal(module.bank[:2], output)
    assert not torch.equal(bank[:, :2].T, output)
    assert lightly.MemoryBankModule((8, 3), feature_dim_first=False)(output)[1].shape == (8, 3)
    assert lightly.MemoryBankModule(0)(output)[1] is None


@pytest.mark.parametrize("temperature", [0.2, 0.05])  # the lower one: a loss far smaller than the scores
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_bank_in_low_precision(dtype, temperature):
    criterion = lightly.NTXentLoss(temperature, memory_bank_size=(40, 17))
    bank, inputs = criterion.memory_bank.bank.clone(), two_views(9, dtype=dtype)
    got = gradients(criterion, inputs)
    want = gradients(lambda a, b: bank_loss(a, b, bank, temperature), [x.double() for x in inputs])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert (g.double() - w).norm() <= 4 * torch.finfo(dtype).eps * w.norm()
    criterion.memory_bank.bank.copy_(bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(*[x.bfloat16() for x in inputs])
    assert loss.dtype == torch.float32


def test_update_momentum():
    model, ema = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    model(randn(9, 3))
    before = copy.deepcopy(ema.state_dict())
    lightly.update_momentum(model, ema, 0.9)
    for name, value in ema.state_dict().items():
        moved = name in dict(ema.named_parameters())
        expected = 0.9 * before[name] + 0.1 * model.state_dict()[name] if moved else before[name]
        torch.testing.assert_close(value, expected, rtol=FLOAT32_BOUND, atol=1e-7)


def test_one_sample():
    """With one sample the loss is zero, as in the original; DCL raises."""
    value, *grads = gradients(lightly.NTXentLoss(), two_views(1))
    assert value == 0
    assert not any(g.any() for g in grads)
    with pytest.raises(ValueError, match="at least 2 samples"):
        lightly.DCLLoss()(*two_views(1))


def test_bad_input():
    a, b = two_views(4, 3)
    with pytest.raises(ValueError, match="temperature: expected at least 1e-8"):
        lightly.NTXentLoss(0)
    with pytest.raises(RuntimeError, match=r"a temperature below zero.*lightly\.loss\.NTXentLoss does not support"):
        lightly.NTXentLoss(-0.1)
    for size in (-1, 4, (4,), (4, -3), (4, 3, 2)):
        with pytest.raises(ValueError, match="memory_bank_size: expected"):
            lightly.NTXentLoss(memory_bank_size=size)
    for criterion in (lightly.NTXentLoss(), lightly.DCLLoss()):
        with pytest.raises(ValueError, match="out1: expected the shape of out0"):
            criterion(a, b[:3])
        with pytest.raises(ValueError, match="out0: expected a"):
            criterion(a[0], b[0])
        with pytest.raises(TypeError, match="out1: expected a"):
            criterion(a, None)
    with pytest.raises(TypeError, match="x1: expected a tensor"):
        lightly.NegativeCosineSimilarity()(a, 3)
    with pytest.raises(ValueError, match="queue: expected shape"):
        lightly.NTXentLoss(memory_bank_size=(8, 5))(a, b)
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        lightly.update_momentum(nn.Linear(2, 2), nn.Linear(2, 2), 1.5)
