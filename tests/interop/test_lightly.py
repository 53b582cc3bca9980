"""Compare compat.lightly with the installed lightly."""

import copy
import inspect
import pickle

import lightly.loss
import lightly.loss.memory_bank
import lightly.models.utils
import pytest
import torch
from interop.helpers import assert_near, assert_same, rows, run_processes, views
from torch import nn

from selfsup_kernels.compat import lightly as ours

TEMPERATURES = [0.5, 0.07]
SHAPES = [(2, 3), (33, 16), (64, 130)]


def squared_distance(out0, out1):
    return 0.3 * ((out0 - 2 * out1) ** 2).sum(1)


@pytest.mark.parametrize("name", ["NTXentLoss", "NegativeCosineSimilarity", "DCLLoss", "DCLWLoss"])
def test_signature(name):
    original, mine = getattr(lightly.loss, name), getattr(ours, name)

    def named(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    assert named(mine.__init__) == named(original.__init__)
    assert named(mine.forward) == named(original.forward)


def test_signature_of_update_momentum():
    assert list(inspect.signature(ours.update_momentum).parameters) == list(
        inspect.signature(lightly.models.utils.update_momentum).parameters
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_ntxent(batch, dim, temperature, dtype):
    bound = 2e-5 if dtype == torch.float32 else 1e-9
    inputs = views(batch, dim, dtype=dtype)
    assert_same(ours.NTXentLoss(temperature), lightly.loss.NTXentLoss(temperature), inputs, bound=bound)


def test_ntxent_of_one_sample_is_zero():
    assert_same(ours.NTXentLoss(), lightly.loss.NTXentLoss(), views(1, 5))


@pytest.mark.parametrize("weights", [None, "DCLW", squared_distance, lambda a, b: 3 * a.detach()[:, 0] ** 2])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_dcl(batch, dim, temperature, weights):
    def make(library):
        if weights == "DCLW":
            return library.DCLWLoss(temperature=temperature, sigma=0.3)
        return library.DCLLoss(temperature=temperature, weight_fn=weights)

    assert_same(make(ours), make(lightly.loss), views(batch, dim))


def test_dcl_in_float64():
    inputs = views(33, 16, dtype=torch.float64)
    for weights in (None, squared_distance):
        assert_same(ours.DCLLoss(0.1, weights), lightly.loss.DCLLoss(0.1, weights), inputs, bound=1e-9)


@pytest.mark.parametrize(
    ("shapes", "dim", "eps"),
    [
        ([(40, 16), (40, 16)], 1, 1e-8),
        ([(40, 16), (40, 16)], 0, 1e-8),
        ([(40, 16), (40, 16)], -1, 1e-3),
        ([(4, 10, 6), (4, 10, 6)], 1, 1e-8),
        ([(4, 10, 6), (10, 1)], 2, 1e-8),
        ([(7,), (7,)], 0, 1e-8),
    ],
)
def test_negative_cosine(shapes, dim, eps):
    inputs = [rows(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_same(ours.NegativeCosineSimilarity(dim, eps), lightly.loss.NegativeCosineSimilarity(dim, eps), inputs)


def test_negative_cosine_at_the_floor():
    """Values agree for norms on both sides of eps; below it the gradient differs (docs/migrate/lightly.md)."""
    x0, x1 = views(40, 16)
    assert ((x0.norm(dim=1) > 3).any(), (x0.norm(dim=1) < 3).any()) == (True, True)
    got, want = (library.NegativeCosineSimilarity(1, 3.0)(x0, x1) for library in (ours, lightly.loss))
    assert_near("value", got, want)


@pytest.mark.parametrize("constant", [0, 1])
def test_negative_cosine_of_a_detached_target(constant):
    def call(loss):
        return lambda *x: loss(*[y.detach() if i == constant else y for i, y in enumerate(x)])

    inputs = views(50, 20)
    assert_same(call(ours.NegativeCosineSimilarity()), call(lightly.loss.NegativeCosineSimilarity()), inputs)


def test_negative_cosine_of_a_zero_row():
    inputs = views(6, 5)
    inputs[0][2] = 0
    assert_same(ours.NegativeCosineSimilarity(), lightly.loss.NegativeCosineSimilarity(), inputs)


def twins(size, temperature=0.2, seed=5):
    """Return ours and the original with the same random bank, drawn from the same seed."""
    made = []
    for library in (ours, lightly.loss):
        torch.manual_seed(seed)
        made.append(library.NTXentLoss(temperature, memory_bank_size=size))
    return made


def assert_same_bank(mine, original):
    assert_near("bank", mine.memory_bank.bank, original.memory_bank.bank, 1e-6)
    assert torch.equal(mine.memory_bank.bank_ptr, original.memory_bank.bank_ptr)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("size", "batches"), [(64, [8] * 10), (20, [7] * 5), (8, [8, 20, 1, 6]), (300, [1, 64, 33])])
def test_memory_bank_over_steps(size, batches, temperature):
    mine, original = twins((size, 12), temperature)
    assert_same_bank(mine, original)
    for step, batch in enumerate(batches):
        assert_same(mine, original, views(batch, 12, seed=step))  # each fills its own bank
        assert_same_bank(mine, original)


def test_memory_bank_does_not_change_without_gradient():
    mine, original = twins((16, 6))
    before = mine.memory_bank.bank.clone()
    out0, out1 = views(5, 6)
    assert_near("value", mine(out0, out1.requires_grad_()).detach(), original(out0, out1).detach())
    with torch.no_grad():
        assert_near("value", mine(out0.requires_grad_(), out1), original(out0, out1))
    assert torch.equal(mine.memory_bank.bank, before)
    assert_same_bank(mine, original)


def test_memory_bank_in_float32_is_close_to_float64():
    """The batch's term is added and subtracted again, and leaves only rounding."""
    mine, original = twins((50, 40), 0.07)
    inputs = views(30, 40)
    got, want = mine(*inputs), original.double()(*[x.double() for x in inputs])
    eager = twins((50, 40), 0.07)[1](*inputs)
    assert abs(got - want) <= max(2 * abs(eager - want), 1e-6)


def test_memory_bank_refuses_what_the_original_refuses():
    for size in (-1, 7, (3, -1), (3, 4, 5)):
        for library in (ours, lightly.loss):
            with pytest.raises(ValueError, match="size"):
                library.NTXentLoss(memory_bank_size=size)


def test_state_dicts_are_interchangeable():
    mine, original = twins((16, 6))
    assert mine.state_dict().keys() == original.state_dict().keys()
    mine.load_state_dict(original.state_dict())
    original.load_state_dict(mine.state_dict())
    names = {name: (b.shape, b.dtype) for name, b in mine.named_buffers()}
    assert names == {name: (b.shape, b.dtype) for name, b in original.named_buffers()}


def test_memory_bank_module():
    for first in (False, True):
        torch.manual_seed(1)
        mine = ours.MemoryBankModule((5, 3), feature_dim_first=first)
        torch.manual_seed(1)
        original = lightly.loss.memory_bank.MemoryBankModule((5, 3), feature_dim_first=first)
        x = rows(4, 3)
        for _ in range(3):
            (_, got), (_, want) = mine(x, update=True), original(x, update=True)
            assert torch.equal(got, want)


def test_copies_and_pickles():
    mine = twins((16, 6))[0]
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other.memory_bank.bank, mine.memory_bank.bank)
        assert torch.equal(other(*views(5, 6)), mine(*views(5, 6)))


@pytest.mark.parametrize("momentum", [0.0, 0.99, 1.0])
def test_update_momentum(momentum):
    def models():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)) for _ in range(2)]

    (model, ema), (model_, ema_) = models(), models()
    for m in (model, model_):
        m(rows(9, 5))
    for _ in range(3):
        ours.update_momentum(model, ema, momentum)
        lightly.models.utils.update_momentum(model_, ema_, momentum)
    for name, want in ema_.state_dict().items():  # includes BatchNorm's statistics, which neither moves
        assert_near(name, ema.state_dict()[name].float(), want.float(), 1e-6)


def in_each_process(rank, world, temperature, dtype):
    """Return [loss, gradients] of ours and of the original; every process has its own data."""
    inputs = views(7, 5, seed=10 * rank, dtype=dtype)
    losses = [
        ("NTXentLoss", (temperature,)),
        ("DCLLoss", (temperature,)),
        ("DCLLoss", (temperature, squared_distance)),
        ("DCLWLoss", (temperature, 0.4)),
    ]
    results = []
    for name, arguments in losses:
        pair = []
        for library in (ours, lightly.loss):
            leaves = [x.clone().requires_grad_() for x in inputs]
            loss = getattr(library, name)(*arguments, gather_distributed=True)(*leaves)
            ((1 + rank) * loss).backward()  # each rank has its own weight, and the gradient is that of the sum
            pair.append([loss.detach(), *[x.grad for x in leaves]])
        results.append(pair)
    return results


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (3, torch.float64)])
def test_gather_distributed(world, dtype):
    for by_loss in run_processes(world, in_each_process, 0.3, dtype):
        for mine, original in by_loss:
            for got, want in zip(mine, original, strict=True):
                assert_near("gathered", got, want, 2e-5 if dtype == torch.float32 else 1e-9)


def bank_in_each_process(rank, world):
    pair = []
    for library in (ours, lightly.loss):
        torch.manual_seed(3)
        criterion = library.NTXentLoss(0.2, memory_bank_size=(16, 5), gather_distributed=True)
        values = [criterion(*[x.requires_grad_() for x in views(3, 5, seed=rank + 10 * i)]).detach() for i in range(4)]
        pair.append([torch.stack(values), criterion.memory_bank.bank, criterion.memory_bank.bank_ptr.float()])
    return pair


def test_memory_bank_over_processes():
    for mine, original in run_processes(2, bank_in_each_process):
        for got, want in zip(mine, original, strict=True):
            assert_near("bank", got, want)
