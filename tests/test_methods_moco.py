"""MoCo against the paper's algorithm in plain float64 code; its queue with batches of any size."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import selfsup_kernels as sk

DIM = 5


def encoder(seed, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers).double()


def head(seed):
    torch.manual_seed(seed)
    return nn.Linear(8, DIM).double()


def moco(impl="auto", queue_size=10, norm=False, **arguments):
    arguments = {"momentum": 0.9, "temperature": 0.2} | arguments
    method = sk.methods.MoCo(encoder(0, norm), head(1), queue_size, impl=impl, **arguments).double()
    method.queue.copy_(F.normalize(method.queue, dim=-1))  # unit rows in float64 too
    return method


def batches(step, num_views=2, samples=7):
    x = randn(samples, 6, seed=step, dtype=torch.float64)
    return [x + (0.3 + 0.2 * v) * randn(samples, 6, seed=100 * (v + 1) + step, dtype=x.dtype) for v in range(num_views)]


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


class EagerMoCo:
    """Algorithm 1 of the paper: the logits matrix, cross entropy with the key in column 0, a list as the queue."""

    def __init__(self, method):
        self.online, self.predictor = copy.deepcopy(method.online), copy.deepcopy(method.predictor)
        self.target = copy.deepcopy(method.online)
        self.queue, self.oldest = [row.clone() for row in method.queue], 0
        self.temperature = method.temperature

    def parameters(self):
        return [*self.online.parameters(), *(self.predictor.parameters() if self.predictor else [])]

    def loss(self, views, symmetric=False):
        queries = [self.online(x) for x in (views if symmetric else views[:1])]
        queries = [F.normalize(self.predictor(q) if self.predictor else q, dim=-1) for q in queries]
        with torch.no_grad():
            keys = [F.normalize(self.target(x), dim=-1) for x in (views if symmetric else views[1:])]
        queue, terms = torch.stack(self.queue), []
        for u, q in enumerate(queries):
            for v, k in enumerate(keys):
                if symmetric and u == v:
                    continue
                logits = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,kc->nk", q, queue)], 1)
                zero = torch.zeros(len(q), dtype=torch.long)
                terms.append(F.cross_entropy(logits / self.temperature, zero))
        for row in torch.cat(keys):
            self.queue[self.oldest] = row
            self.oldest = (self.oldest + 1) % len(self.queue)
        return sum(terms) / len(terms)

    @torch.no_grad()
    def update(self, m):
        for s, t in zip(self.online.parameters(), self.target.parameters(), strict=True):
            t.copy_(m * t + (1 - m) * s)
        for s, t in zip(self.online.buffers(), self.target.buffers(), strict=True):
            t.copy_(s)


@pytest.mark.parametrize(
    ("queue_size", "samples"),
    [(10, 5), (10, 7), (6, 7), (7, 7), (1, 7), (64, 1), (3, 10)],
    ids=lambda value: str(value),
)
def test_training_equals_plain_code(impl, queue_size, samples):
    method = moco(impl, queue_size)
    eager = EagerMoCo(method)
    optimizer, eager_optimizer = (torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (method, eager))
    start = state(method)
    for step in range(5):
        views = batches(step, samples=samples)
        loss, expected = method(*views), eager.loss(views)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
        for o, value in ((optimizer, loss), (eager_optimizer, expected)):
            o.zero_grad()
            value.backward()
            o.step()
        method.update_target()
        eager.update(0.9)
        torch.testing.assert_close(method.queue, torch.stack(eager.queue), rtol=1e-9, atol=1e-10)
        assert method.queue_ptr.item() == eager.oldest
    for p, e in zip(method.parameters(), [*eager.parameters(), *eager.target.parameters()], strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-9)
    for part in ("online.encoder.0.weight", "target.module.projector.weight", "queue"):
        assert not torch.equal(method.state_dict()[part], start[part]), f"{part} did not move"


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("with_predictor", [False, True])
def test_symmetric_and_predictor(impl, num_views, with_predictor):
    torch.manual_seed(3)
    predictor = nn.Linear(DIM, DIM).double() if with_predictor else None
    method = moco(impl, norm=True, symmetric=True, predictor=predictor)
    eager = EagerMoCo(method)
    for step in range(3):
        views = batches(step, num_views)
        loss, expected = method(views), eager.loss(views, symmetric=True)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
        ours = torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad])
        for g, w in zip(ours, torch.autograd.grad(expected, eager.parameters()), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(method.queue, torch.stack(eager.queue), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_single_precision_is_as_near_as_eager(impl, temperature):
    """The error is at most twice that of eager code in the same dtype, plus a small floor."""
    wide = moco(impl, 200, temperature=temperature)
    narrow = copy.deepcopy(wide).float()
    views = batches(0, samples=20)
    eager = EagerMoCo(wide)
    eager_narrow = EagerMoCo(narrow)
    want = eager.loss(views)
    want_grads = torch.autograd.grad(want, eager.parameters())
    low = [x.float() for x in views]
    yardstick = eager_narrow.loss(low)
    yardstick_grads = torch.autograd.grad(yardstick, eager_narrow.parameters())
    loss = narrow(low)
    grads = torch.autograd.grad(loss, list(narrow.online.parameters()))
    assert abs(loss.item() - want.item()) <= 2 * abs(yardstick.item() - want.item()) + 1e-6 * want.item() + 1e-7
    for g, y, w in zip(grads, yardstick_grads, want_grads, strict=True):
        floor = 2e-6 * w.norm()
        assert (g.double() - w).norm() <= 2 * (y.double() - w).norm() + floor


def test_small_loss_has_its_gradient(impl):
    """With queue rows opposite to the query, the loss is near zero but must not round to zero."""
    method = moco(impl, 4, temperature=0.05).eval()
    views = [batches(0)[0]] * 2
    with torch.no_grad():
        method.queue.copy_(-F.normalize(method.online(views[0]), dim=-1)[:4])
    loss = method(views)
    q = F.normalize(method.online(views[0]), dim=-1)
    scores = (q @ method.queue.T / 0.05).logsumexp(-1)
    expected = torch.log1p((scores - (q * q.detach()).sum(-1) / 0.05).exp()).mean()
    ours, want = (torch.autograd.grad(x, method.projector.weight)[0] for x in (loss, expected))
    assert 0 < expected < 1e-9
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_large_loss_is_exact(impl):
    """The query itself is in the queue and scores 21 above the key: log(1 + exp(21)) is not 21."""
    method, views = moco(impl, 1).eval(), [x[:1] for x in batches(0)]
    with torch.no_grad():
        q, k = (F.normalize(method.online(x), dim=-1) for x in views)
        method.queue.copy_(q)
        method.temperature = ((1 - (q * k).sum()) / 21).item()
        expected = torch.tensor(21.0, dtype=torch.float64).exp().log1p()
        torch.testing.assert_close(method(views), expected, rtol=1e-13, atol=0)


def test_enqueueing_before_backward_changes_no_gradient(impl):
    """The queue is overwritten in place between forward and backward; the gradient uses its old rows."""
    method = moco(impl)
    views = batches(0)
    eager = EagerMoCo(method)
    loss = method(views)
    before = method.queue.clone()
    method.enqueue(F.normalize(randn(10, DIM, dtype=torch.float64, seed=9), dim=-1))
    assert not torch.equal(before, method.queue)
    got = torch.autograd.grad(loss, method.projector.weight)[0]
    want = torch.autograd.grad(eager.loss(views), eager.online.projector.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_the_queue_is_not_reallocated(op_impl):
    """No new queue is allocated, and only the loss' own copy of that size is saved for backward."""
    method = moco(op_impl, 5000)
    address, kept = method.queue.data_ptr(), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method(batches(0))
    assert method.queue.data_ptr() == address
    large = {t.data_ptr(): tuple(t.shape) for t in kept if t.numel() >= method.queue.numel()}
    assert len(large) <= 1
    assert address not in large
    # One number for each row of batch and queue is fine.
    assert max(t.numel() for t in kept if t.data_ptr() not in large) < 2 * 5000, "a (B, K) table was kept"


def test_no_gradient_for_keys_queue_and_target(impl):
    method = moco(impl)
    q, k = (x.requires_grad_() for x in batches(0))
    method(q, k).backward()
    assert q.grad is not None
    assert k.grad is None
    assert not method.queue.requires_grad
    assert all(p.grad is None for p in method.target.parameters())


def test_eval_mode_leaves_the_queue_alone(impl):
    method = moco(impl).eval()
    before = state(method)
    first, second = method(batches(0)), method(batches(0))
    assert torch.equal(first, second)
    for name, value in state(method).items():
        assert torch.equal(value, before[name]), name


def test_state_resumes_and_loads_strictly(impl):
    def train(method, steps):
        optimizer = torch.optim.SGD(method.online.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            method(batches(step)).backward()
            optimizer.step()
            method.update_target()

    straight, resumed = moco(impl), moco(impl, momentum=0.9)
    train(straight, range(3))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert resumed.queue_ptr.item() == 21 % 10
    for method in (straight, resumed):
        train(method, range(3, 5))
    for (name, a), b in zip(state(straight).items(), state(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RuntimeError, match="queue"):
        moco(impl, 11).load_state_dict(straight.state_dict())
    without = {k: v for k, v in straight.state_dict().items() if k != "queue_ptr"}
    with pytest.raises(RuntimeError, match="queue_ptr"):
        moco(impl).load_state_dict(without)


def test_initial_queue_is_the_same_everywhere_and_leaves_the_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sk.methods.MoCo(nn.Identity(), nn.Identity(), 4, dim=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = sk.methods.MoCo(nn.Identity(), nn.Identity(), 4, dim=3)
    assert torch.equal(first.queue, second.queue)
    torch.testing.assert_close(first.queue.norm(dim=-1), torch.ones(4))
    assert first.temperature == 0.07
    assert sk.methods.MoCo(nn.Identity(), nn.Linear(3, 2)).queue.shape == (65536, 2)


def test_autocast_and_low_precision(impl):
    method, views = moco(impl).float(), [x.float() for x in batches(0)]
    want = copy.deepcopy(method)(views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = copy.deepcopy(method)(views)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=3e-2, atol=3e-2)
    low = copy.deepcopy(method).bfloat16()
    loss = low([x.bfloat16() for x in views])
    torch.testing.assert_close(loss, want, rtol=5e-2, atol=5e-2)
    assert low.queue.dtype == torch.bfloat16
    loss.backward()
    assert low.projector.weight.grad.isfinite().all()


def test_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    method = moco(impl)
    twin, views = copy.deepcopy(method), batches(0)
    loss = torch.compile(method, fullgraph=True, backend="aot_eager")(*views)
    torch.testing.assert_close(loss, twin(*views))
    loss.backward()
    assert torch.equal(method.queue, twin.queue)
    assert method.queue_ptr.item() == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queue_size": 0}, ValueError, "queue_size: expected an integer >= 1, got 0"),
        ({"queue_size": 2.0}, ValueError, "queue_size"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"projector": nn.Identity()}, ValueError, "dim: expected the width"),
        ({"dim": -1}, ValueError, "dim: expected None or an integer >= 1, got -1"),
        ({"predictor": 3}, TypeError, "predictor"),
        ({"encoder": None}, TypeError, "encoder"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.methods.MoCo(**({"encoder": encoder(0), "projector": head(1)} | arguments))


def test_bad_views(impl):
    with pytest.raises(ValueError, match="views: expected at least 2"):
        moco(impl)(batches(0)[0])
    with pytest.raises(ValueError, match=r"views: expected 2, a query's and a key's.*got 3"):
        moco(impl)(batches(0, 3))
    with pytest.raises(ValueError, match="as many samples in each, got 7 and 5"):
        moco(impl)(batches(0)[0], batches(0)[1][:5])
    with pytest.raises(ValueError, match=r"queries: expected \(B, 4\), as the queue has, got \(7, 5\)"):
        moco(impl, dim=4)(batches(0))
