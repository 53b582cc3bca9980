"""Chunked encoding: gradients equal to one pass, replayed random numbers and buffers, memory of one chunk."""

import copy
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import selfsup_kernels as sk


def mlp(seed=0, inside=6, dropout=0.0, norm=False, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(inside, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 5)).to(dtype)


def batch(samples=11, num_views=2, dim=6, dtype=torch.float64):
    x = randn(samples, dim, dtype=dtype)
    return [x + (0.3 + 0.4 * v) * randn(samples, dim, seed=v + 1, dtype=dtype) for v in range(num_views)]


def contrast(rows, temperature=0.3):
    """An eager loss of every view against every other view, independent of the package."""
    z = [F.normalize(r, dim=-1) for r in rows]
    pairs = [(u, v) for u in range(len(z)) for v in range(len(z)) if u != v]
    return sum(F.cross_entropy(z[u] @ z[v].T / temperature, torch.arange(len(z[0]))) for u, v in pairs)


def gradients(*modules):
    return [p.grad.clone() for m in modules for p in m.parameters()]


def assert_equal(got, want, bound=1e-12):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert w.norm() > 0
        assert (g - w).norm() <= bound * w.norm(), f"gradient {i}: {(g - w).norm() / w.norm():.2e}"


def one_pass(loss, encoders, views):
    encoders = encoders if isinstance(encoders, list) else [encoders] * len(views)
    value = loss([f(x) for f, x in zip(encoders, views, strict=True)])
    value.backward()
    return value.detach()


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 50, [3, 5, 2]])
@pytest.mark.parametrize("shared", [True, False])
def test_gradient_of_one_pass(chunk_size, shared):
    views = batch(num_views=3)
    encoders = mlp() if shared else [mlp(v) for v in range(3)]
    twins = copy.deepcopy(encoders)
    want = one_pass(contrast, twins, views)
    got = sk.chunked_backward(encoders, views, contrast, chunk_size)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    assert not got.requires_grad
    modules, twin_modules = ([m] if shared else m for m in (encoders, twins))
    assert_equal(gradients(*modules), gradients(*twin_modules))


@pytest.mark.parametrize("objective", ["supcon_out", "cross_view"])
def test_with_our_losses_and_a_trained_temperature(impl, objective):
    """Gradients are added to existing ones, and reach the parameters of the loss."""
    views = batch()
    encoder, criterion = mlp(), sk.InfoNCELoss(0.2, learnable_temperature=True, objective=objective, impl=impl)
    twin, twin_criterion = copy.deepcopy(encoder), copy.deepcopy(criterion)
    for _ in range(2):
        sk.chunked_backward(encoder, views, criterion, 4)
        one_pass(twin_criterion, twin, views)
    assert_equal(gradients(encoder, criterion), gradients(twin, twin_criterion), 1e-7)
    assert_equal(gradients(encoder), gradients(twin), 1e-12)


class Masks(nn.Module):
    """Dropout that records which elements it kept, as 0 and 1."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 5)
        self.kept = []
        self.double()

    def forward(self, x):
        x = self.dropout(self.first(x).abs() + 1)
        self.kept.append(((x != 0).double(), torch.is_grad_enabled()))
        return self.last(x)


def test_dropout_masks_are_the_same_in_both_passes():
    torch.manual_seed(0)
    encoder, views = Masks(), batch()
    torch.manual_seed(5)
    got = sk.chunked_backward(encoder, views, contrast, 4)
    after = torch.rand(3)
    first = [kept for kept, grad in encoder.kept if not grad]
    second = [kept for kept, grad in encoder.kept if grad]
    assert len(first) == len(second) == 6
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])
    assert 0.2 < first[0].mean() < 0.8
    # The same masks in one pass give the same loss and gradient.
    masks = [torch.cat(first[:3]), torch.cat(first[3:])]
    hidden = [encoder.first(x).abs() + 1 for x in views]
    want = contrast([encoder.last(h * mask * 2) for h, mask in zip(hidden, masks, strict=True)])
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), list(torch.autograd.grad(want, list(encoder.parameters()))))
    # The generator continues from its state after the first encoding.
    torch.manual_seed(5)
    for mask in first:
        assert torch.equal((F.dropout(torch.ones_like(mask), 0.5) != 0).double(), mask)
    assert torch.equal(torch.rand(3), after)


def test_a_loss_that_draws_random_numbers_draws_them_once():
    encoder, views, drawn = mlp(dropout=0.3), batch(), []

    def loss(rows):
        drawn.append(torch.rand(()))
        return contrast(rows) * (1 + drawn[-1])

    sk.chunked_backward(encoder, views, loss, 4)
    after = torch.rand(())
    assert len(drawn) == 1
    assert after not in drawn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_masks_on_a_gpu():
    encoder, views = Masks().cuda(), [x.cuda() for x in batch()]
    sk.chunked_backward(encoder, views, lambda rows: (rows[0] * rows[1].roll(1)).sum(), 4)
    first = [kept for kept, grad in encoder.kept if not grad]
    second = [kept for kept, grad in encoder.kept if grad]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batchnorm_statistics_are_updated_once():
    views, encoder = batch(), mlp(norm=True)
    eager = copy.deepcopy(encoder)
    z = [torch.cat([eager(x) for x in view.split(4)]) for view in views]  # every chunk once, in order, with a graph
    want = contrast(z)
    want.backward()
    got = sk.chunked_backward(encoder, views, contrast, 4)
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(eager))
    for (name, a), b in zip(encoder.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert encoder[1].num_batches_tracked == 6


def test_batchnorm_in_eval_mode_is_exact():
    views, encoder = batch(), mlp(norm=True).eval()
    twin = copy.deepcopy(encoder)
    want = one_pass(contrast, twin, views)
    torch.testing.assert_close(sk.chunked_backward(encoder, views, contrast, 3), want, rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(twin))


def test_a_forward_that_depends_on_its_own_buffers():
    """Spectral normalisation updates its vectors in every forward and uses them."""
    encoder = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5, dtype=torch.float64)))
    eager, views = copy.deepcopy(encoder), batch()
    want = contrast([torch.cat([eager(x) for x in view.split(4)]) for view in views])
    want.backward()
    got = sk.chunked_backward(encoder, views, contrast, 4)
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(eager))


def test_a_buffer_that_is_replaced_and_not_written():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x) * (1 + 0.1 * self.calls)

    encoder = Counter()
    eager, views = copy.deepcopy(encoder), batch()
    want = contrast([torch.cat([eager(x) for x in view.split(4)]) for view in views])
    want.backward()
    got = sk.chunked_backward(encoder, views, contrast, 4)
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(eager))
    assert encoder.calls == 6


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(3, 5, dtype=torch.float64)

    def forward(self, x, extra, scale=1.0):
        return self.a(x) * scale + self.b(extra["inner"][0]).tanh()


@pytest.mark.parametrize("form", ["tuple", "list", "mapping"])
def test_inputs_of_several_tensors(form):
    encoder, (x, y) = TwoInputs(), batch()
    nested = [{"inner": (randn(11, 3, seed=s, dtype=torch.float64), "text")} for s in (5, 6)]
    scale = torch.tensor(1.7)
    if form == "mapping":
        views = [{"x": a, "extra": b, "scale": scale} for a, b in zip((x, y), nested, strict=True)]
    else:
        views = [(tuple if form == "tuple" else list)((a, b, scale)) for a, b in zip((x, y), nested, strict=True)]
    twin = copy.deepcopy(encoder)
    want = contrast([twin(a, b, scale) for a, b in zip((x, y), nested, strict=True)])
    want.backward()
    got = sk.chunked_backward(encoder, views, contrast, 4)
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    assert_equal(gradients(encoder), gradients(twin))


def test_functions_methods_and_partials():
    """The bound method ``embed``, whose module's buffers are found; a plain function needs ``modules=``."""
    views, ways = batch(), {}
    for way in ("method", "partial", "function"):
        method = sk.methods.CMC(mlp(norm=True), nn.Linear(5, 4, dtype=torch.float64))
        torch.manual_seed(1)
        nn.init.normal_(method.projector.weight)
        if way == "method":
            arguments = {"encoder": method.embed}
        elif way == "partial":
            arguments = {"encoder": [functools.partial(method.embed, view=v) for v in range(2)]}
        else:
            arguments = {"encoder": lambda x, m=method: m.embed(x), "modules": method}
        sk.chunked_backward(views=views, loss=contrast, chunk_size=4, **arguments)
        assert method.encoder[1].num_batches_tracked == 6
        ways[way] = [method.encoder[0].weight.grad, method.encoder[1].running_mean]
    for other in ("partial", "function"):
        for a, b in zip(ways["method"], ways[other], strict=True):
            assert torch.equal(a, b)


def test_views_of_other_lengths_and_rows_of_more_dimensions():
    encoder, (x, _) = mlp(), batch()
    longer = randn(17, 6, seed=3, dtype=torch.float64)
    views = [x.view(11, 1, 6).expand(11, 3, 6), longer]

    def loss(rows):
        return (rows[0].mean(1) @ rows[1].T).square().mean()

    twin = copy.deepcopy(encoder)
    want = one_pass(loss, twin, views)
    torch.testing.assert_close(sk.chunked_backward(encoder, views, loss, 4), want)
    assert_equal(gradients(encoder), gradients(twin))


def test_a_frozen_encoder_is_run_once():
    trained, frozen = mlp(0), mlp(1, norm=True).requires_grad_(False)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    twin, twin_frozen, views = copy.deepcopy(trained), copy.deepcopy(frozen), batch()
    z = torch.cat([twin_frozen(x) for x in views[1].split(4)])
    contrast([twin(views[0]), z]).backward()
    calls.clear()
    sk.chunked_backward([trained, frozen], views, contrast, 4)
    assert len(calls) == 3
    assert frozen[1].num_batches_tracked == 3
    assert_equal(gradients(trained), gradients(twin))


def test_gradient_reaches_inputs_that_are_leaves():
    encoder, views = mlp(), [x.requires_grad_() for x in batch()]
    twin, twins = copy.deepcopy(encoder), [x.detach().clone().requires_grad_() for x in views]
    one_pass(contrast, twin, twins)
    sk.chunked_backward(encoder, views, contrast, 4)
    assert_equal([x.grad for x in views], [x.grad for x in twins])


def test_a_view_that_the_loss_does_not_use():
    encoder, views = mlp(), batch()
    twin = copy.deepcopy(encoder)
    twin(views[0]).square().sum().backward()
    sk.chunked_backward(encoder, views, lambda rows: rows[0].square().sum(), 4)
    assert_equal(gradients(encoder), gradients(twin))


# Memory


class Live:
    """Counts the elements of non-parameter tensors that autograd holds now and held at most."""

    def __init__(self, module):
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.most = 0

    def pack(self, tensor):
        kept = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            kept = Holder(kept)
            self.now += tensor.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(kept, self.drop, tensor.numel())
        return kept

    def drop(self, count):
        self.now -= count

    def unpack(self, kept):
        return kept.tensor if isinstance(kept, Holder) else kept

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def most_saved(encoder, samples, chunk_size):
    """Return the most elements that the encoder's graphs held; the loss is linear in the rows and saves nothing."""
    live, views = Live(encoder), batch(samples)
    weights = [randn(samples, 5, seed=v + 9, dtype=torch.float64) for v in range(2)]

    def loss(rows):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # exclude the loss
            return sum((r * w).sum() for r, w in zip(rows, weights, strict=True))

    gc.collect()
    with live.watch():
        if chunk_size is None:
            one_pass(loss, encoder, views)
        else:
            sk.chunked_backward(encoder, views, loss, chunk_size)
    return live.most


def test_activations_of_one_chunk_are_in_memory():
    encoder = mlp()
    whole = most_saved(encoder, 64, None)
    chunk = most_saved(encoder, 64, 8)
    assert whole == 2 * 8 * chunk  # two views of eight chunks
    assert most_saved(encoder, 256, 8) == chunk  # independent of the batch size


# Mixed precision


def test_autocast_equals_one_pass_under_autocast():
    """Both encodings run in bfloat16, and the weights' gradients come through their casts."""
    encoder, views = mlp(dtype=torch.float32), batch(dtype=torch.float32)
    twin, seen = copy.deepcopy(encoder), []
    encoder.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = contrast([twin(x) for x in views])
        got = sk.chunked_backward(encoder, views, contrast, 4)
    want.backward()
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=1e-3)
    for g, w in zip(gradients(encoder), gradients(twin), strict=True):
        assert w.norm() > 0
        assert (g - w).norm() <= 2e-2 * w.norm()


def test_backward_runs_outside_autocast():
    encoder, views, states = mlp(dtype=torch.float32), batch(dtype=torch.float32), []

    def watch(module, inputs, rows):
        if rows.requires_grad:
            rows.register_hook(lambda grad: states.append(torch.is_autocast_enabled("cpu")))

    encoder.register_forward_hook(watch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sk.chunked_backward(encoder, views, contrast, 4)
        assert torch.is_autocast_enabled("cpu")
    assert states == [False] * 6


def test_scaler_and_backward():
    views = batch(dtype=torch.float32)
    encoder = mlp(dtype=torch.float32)
    twin = copy.deepcopy(encoder)
    want = one_pass(contrast, twin, views)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    got = sk.chunked_backward(encoder, views, contrast, 4, scaler=scaler)
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients(encoder), gradients(twin), strict=True):
        torch.testing.assert_close(g, 1024 * w, rtol=1e-4, atol=1e-3)
    scaler.unscale_(optimizer)
    for g, w in zip(gradients(encoder), gradients(twin), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    scaler.step(optimizer)
    scaler.update()
    encoder.zero_grad()
    sk.chunked_backward(twin, views, contrast, 4, backward=lambda loss: (loss * -1).backward())
    for p in twin.parameters():
        torch.testing.assert_close(p.grad, torch.zeros_like(p), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"views": torch.zeros(3)},
            ValueError,
            r"views: expected a \(V, B, ...\) tensor or a sequence, got shape \(3,\)",
        ),
        ({"views": {"x": torch.zeros(3)}}, TypeError, "views: expected .* a sequence of one input per view, got dict"),
        ({"views": []}, ValueError, "views: expected at least one"),
        ({"views": [torch.zeros(0, 6)] * 2}, ValueError, r"views\[0\]: expected tensors of one length >= 1, got \[0\]"),
        ({"views": [(torch.zeros(3, 6), torch.zeros(4))] * 2}, ValueError, r"views\[0\].*\[3, 4\]"),
        ({"views": ["text", "text"]}, ValueError, r"views\[0\]: .*got none"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected an integer >= 1, got 0"),
        ({"chunk_size": [4]}, ValueError, "chunk_size: expected one, or 2, one per view, got 1"),
        ({"encoder": [nn.Identity()] * 3}, ValueError, "encoder: expected one, or 2, one per view, got 3"),
        ({"encoder": 3}, TypeError, "encoder: expected a module or a function, got int"),
        ({"encoder": lambda x: x.sum(0)}, ValueError, "encoder: expected 4 rows for a chunk of 4"),
        ({"encoder": lambda x: (x, x)}, TypeError, "encoder: expected one that returns a tensor, got tuple"),
        ({"encoder": lambda x: x.long()}, TypeError, "encoder: .*floating rows, got torch.int64"),
        ({"loss": lambda rows: rows[0]}, ValueError, r"loss: .*one element, got shape \(11, 5\)"),
        ({"loss": lambda rows: 3.0}, ValueError, "loss: .*got float"),
        ({"scaler": object(), "backward": print}, ValueError, "backward: expected None together with scaler"),
    ],
)
def test_bad_arguments(arguments, error, message):
    call = {"encoder": mlp(), "views": batch(), "loss": contrast, "chunk_size": 4} | arguments
    with pytest.raises(error, match=message):
        sk.chunked_backward(**call)


def test_without_gradients():
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients to be on"):
        sk.chunked_backward(mlp(), batch(), contrast, 4)


def test_a_loss_that_raises_changes_nothing():
    encoder = mlp(norm=True)
    before = copy.deepcopy(encoder.state_dict())

    def loss(rows):
        raise KeyError("no")

    with pytest.raises(KeyError):
        sk.chunked_backward(encoder, batch(), loss, 4)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("chunk_size", [np.int64(4), [np.int32(4), 3]], ids=str)
def test_a_loss_of_one_element_and_sizes_of_numpy(chunk_size):
    model, views = mlp(), batch()
    sk.chunked_backward(model, views, lambda rows: contrast(rows).reshape(1), chunk_size)
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    contrast([model(x) for x in views]).backward()
    for ours, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)
