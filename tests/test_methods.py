"""Complete methods: a few training steps equal plain eager code, step by step."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES

STEPS = 4


def encoder(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())


def head(seed, out=5):
    torch.manual_seed(seed)
    return nn.Linear(8 if out == 5 else 5, out)


def batches(step, num_views=2, samples=7):
    x = randn(samples, 6, seed=step)
    return [x + 0.3 * randn(samples, 6, seed=100 * (v + 1) + step) for v in range(num_views)]


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_close(got, want, rtol=1e-4, atol=1e-6):
    assert got.keys() == want.keys()
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def byol(impl, **arguments):
    return sk.methods.BYOL(encoder(0), head(1), nn.Linear(5, 5), 0.9, impl=impl, **arguments)


class EagerBYOL:
    """The paper's algorithm in plain PyTorch: a deep copy as target, cosine_similarity, a loop for the average."""

    def __init__(self, method, buffers):
        self.f, self.g, self.q = (copy.deepcopy(m) for m in (method.encoder, method.projector, method.predictor))
        self.ft, self.gt = copy.deepcopy(self.f), copy.deepcopy(self.g)
        self.buffers = buffers

    def parameters(self):
        return [p for m in (self.f, self.g, self.q) for p in m.parameters()]

    def loss(self, views):
        predictions = [self.q(self.g(self.f(x))) for x in views]
        targets = [self.gt(self.ft(x)).detach() for x in views]
        terms = []
        for u, p in enumerate(predictions):
            for v, t in enumerate(targets):
                if u != v:
                    terms.append((2 - 2 * F.cosine_similarity(p, t)).mean())
        return sum(terms) / len(terms)

    def update(self, m):
        with torch.no_grad():
            for online, target in ((self.f, self.ft), (self.g, self.gt)):
                for s, t in zip(online.parameters(), target.parameters(), strict=True):
                    t.copy_(m * t + (1 - m) * s)
                for s, t in zip(online.buffers(), target.buffers(), strict=True):
                    if self.buffers == "copy" or (self.buffers == "average" and not t.is_floating_point()):
                        t.copy_(s)
                    elif self.buffers == "average":
                        t.copy_(m * t + (1 - m) * s)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("num_views", [2, 3])
def test_byol_training_equals_plain_code(impl, num_views, buffers):
    method = byol(impl, buffers=buffers)
    eager = EagerBYOL(method, buffers)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    eager_optimizer = torch.optim.SGD(eager.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    start = state(method)
    for step in range(STEPS):
        views = batches(step, num_views)
        m = sk.cosine_momentum(step, STEPS, base=0.9)
        loss, expected = method(*views), eager.loss(views)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for o, value in ((optimizer, loss), (eager_optimizer, expected)):
            o.zero_grad()
            value.backward()
            o.step()
        method.update_target(m)
        eager.update(m)
    assert_close(state(method.encoder), state(eager.f))
    assert_close(state(method.projector), state(eager.g))
    assert_close(state(method.predictor), state(eager.q))
    assert_close(state(method.target.module.encoder), state(eager.ft))
    assert_close(state(method.target.module.projector), state(eager.gt))
    for part in ("online.encoder.0.weight", "predictor.weight", "target.module.projector.weight"):
        assert not torch.equal(method.state_dict()[part], start[part]), f"{part} did not move"


def test_byol_target_moves_exactly_by_ema(impl):
    method = byol(impl)
    with torch.no_grad():
        for p in method.online.parameters():
            p.add_(1)
    before = state(method.target.module)
    method.update_target()
    for name, p in method.online.named_parameters():
        expected = before[name] + 0.1 * (p.detach() - before[name])
        torch.testing.assert_close(method.target.module.state_dict()[name], expected, rtol=1e-6, atol=1e-7)
    method.update_target(0.0)
    for name, p in method.online.named_parameters():
        assert torch.equal(method.target.module.state_dict()[name], p)


def test_byol_gradient_stops_at_the_target(impl):
    method = byol(impl)
    method.target.module.requires_grad_(True)  # has no effect on the loss
    outputs = []
    method.target.register_forward_hook(lambda module, args, output: outputs.append(output))
    x1, x2 = (x.requires_grad_() for x in batches(0))
    method(x1, x2).backward()
    assert [t.requires_grad for t in outputs] == [False, False]  # no graph is kept for the target either
    assert all(p.grad is None for p in method.target.parameters())
    for name, p in (*method.online.named_parameters(), *method.predictor.named_parameters()):
        assert p.grad is not None, name
    # The loss of a single direction reaches only the view that predicts.
    x1.grad = x2.grad = None
    p1 = method.predictor(method.online(x1))
    with torch.no_grad():
        t2 = method.target(x2)
    sk.byol_loss(p1, t2, impl=impl).backward()
    assert x1.grad is not None
    assert x2.grad is None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_byol_an_optimizer_of_all_parameters_leaves_the_target_alone(impl, make):
    method = byol(impl)
    optimizer = make(method.parameters(), lr=0.1, weight_decay=0.5)
    before = state(method.target)
    method(*batches(0)).backward()
    optimizer.step()
    for name, p in method.target.named_parameters():
        assert torch.equal(p, before[name]), name
        assert not p.requires_grad


def test_byol_modes(impl):
    method = byol(impl)
    x1, x2 = batches(0)
    tracked = [m.num_batches_tracked for m in method.modules() if isinstance(m, nn.BatchNorm1d)]
    method(x1, x2)
    assert [t.item() for t in tracked] == [2, 2]  # online and target, once per view
    method.eval()
    assert not method.target.module.training
    first, second = method(x1, x2), method(x1, x2)
    assert torch.equal(first, second)
    assert [t.item() for t in tracked] == [2, 2]
    method.train()
    assert method.target.module[0][1].training


def test_byol_starts_with_the_target_equal_to_the_online_network(impl):
    method = byol(impl).eval()
    x, _ = batches(0)
    assert torch.equal(method.online(x), method.target(x))
    assert method.encoder is method.online[0]
    assert method.projector is method.online[1]


def train(method, steps, start=0):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        method(*batches(step)).backward()
        optimizer.step()
        method.update_target()


def test_byol_resumes_from_its_state(impl):
    straight = byol(impl)
    resumed = byol(impl)
    resumed.predictor.load_state_dict(straight.predictor.state_dict())
    train(straight, 2)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert not any(name.startswith("target._model") for name in straight.state_dict())
    train(straight, 2, start=2)
    train(resumed, 2, start=2)
    assert_close(state(resumed), state(straight), rtol=0, atol=0)


def test_byol_deep_copies_are_independent(impl):
    method = byol(impl)
    twin = copy.deepcopy(method)
    before = state(method)
    train(twin, 2)
    assert_close(state(method), before, rtol=0, atol=0)
    train(method, 2)
    assert_close(state(method), state(twin), rtol=0, atol=0)


def test_byol_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    method = byol(impl)
    twin = copy.deepcopy(method)
    views = batches(0)
    loss = torch.compile(method, fullgraph=True, backend="aot_eager")(*views)
    torch.testing.assert_close(loss, twin(*views))
    loss.backward()
    assert method.predictor.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x, nn.Identity(), nn.Identity()), TypeError, "encoder"),
        ((nn.Identity(), None, nn.Identity()), TypeError, "projector"),
        ((nn.Identity(), nn.Identity(), "mlp"), TypeError, "predictor"),
        ((nn.Linear(2, 2), nn.Identity(), nn.Identity(), 1.1), ValueError, "momentum"),
    ],
)
def test_byol_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.methods.BYOL(*arguments)


def test_byol_bad_views(impl):
    method = byol(impl)
    x = batches(0)[0]
    for views in ((), (x,), ([x],), (torch.stack([x, x]),)):
        with pytest.raises(ValueError, match="views: expected at least 2"):
            method(*views)


# CMC


def eager_cmc(views, encoders, projectors, temperature, pairs):
    """Cross entropy of each view's rows against the other view's samples, for every pair of views, in plain PyTorch."""
    z = [F.normalize(g(f(x)), dim=-1) for x, f, g in zip(views, encoders, projectors, strict=True)]
    target = torch.arange(len(views[0]))
    terms = {}
    for u, v in pairs:
        terms.setdefault(u, []).append(F.cross_entropy(z[u] @ z[v].T / temperature, target))
    # Every anchor has equal weight, independent of the number of views it is compared with.
    return torch.stack([torch.stack(t).mean() for t in terms.values()]).mean()


def all_pairs(num_views, core_view=None):
    pairs = [(u, v) for u in range(num_views) for v in range(num_views) if u != v]
    return [pair for pair in pairs if core_view is None or core_view in pair]


@pytest.mark.parametrize("core_view", [None, 1])
@pytest.mark.parametrize("per_view", ["shared", "encoders", "projectors", "both"])
@pytest.mark.parametrize("num_views", [2, 3])
def test_cmc_training_equals_plain_code(impl, num_views, per_view, core_view):
    f = [encoder(v) for v in range(num_views)] if per_view in ("encoders", "both") else encoder(0)
    g = [head(10 + v) for v in range(num_views)] if per_view in ("projectors", "both") else head(10)
    eager_f, eager_g = copy.deepcopy(f), copy.deepcopy(g)
    eager_parameters = [
        p for m in (eager_f, eager_g) for n in (m if isinstance(m, list) else [m]) for p in n.parameters()
    ]
    method = sk.methods.CMC(f, g, 0.2, core_view=core_view, impl=impl)
    assert len(list(method.parameters())) == len(eager_parameters)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    eager_optimizer = torch.optim.SGD(eager_parameters, lr=0.1)
    for step in range(STEPS):
        views = batches(step, num_views)
        expected = eager_cmc(
            views,
            eager_f if isinstance(eager_f, list) else [eager_f] * num_views,
            eager_g if isinstance(eager_g, list) else [eager_g] * num_views,
            0.2,
            all_pairs(num_views, core_view),
        )
        loss = method(views) if step % 2 else method(*views)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for o, value in ((optimizer, loss), (eager_optimizer, expected)):
            o.zero_grad()
            value.backward()
            o.step()
    for p, e in zip(method.parameters(), eager_parameters, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-4, atol=1e-5)


def test_cmc_options_reach_the_loss(impl):
    views = batches(0, 3)
    z = [head(1)(encoder(0)(x)) for x in views]
    method = sk.methods.CMC(encoder(0), head(1), 0.3, objective="supcon_out", impl=impl)
    expected = sk.info_nce_loss(z, temperature=0.3, objective="supcon_out", impl=impl)
    torch.testing.assert_close(method(views), expected)
    assert sk.methods.CMC(encoder(0), head(1)).loss.temperature == 0.07
    assert sk.methods.CMC(encoder(0), head(1)).loss.objective == "cross_view"
    method = sk.methods.CMC(encoder(0), head(1), 0.3, learnable_temperature=True, max_scale=50, impl=impl)
    method(views).backward()
    assert method.loss.logit_scale.grad.item() != 0


@pytest.mark.parametrize("name", ["labels", "duplicates", "logq"])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_cmc_pairs(impl, objective, name):
    views, ids = batches(0, 3), torch.tensor([0, 1, 0, 2, 1, 2, 2])
    arguments = {name: ids.float() if name == "logq" else ids}
    z = [head(1)(encoder(0)(x)) for x in views]
    method = sk.methods.CMC(encoder(0), head(1), 0.3, objective=objective, impl=impl)
    expected = spec.info_nce_loss(torch.stack(z), temperature=0.3, objective=objective, **arguments)
    for given in (views, [views]):
        torch.testing.assert_close(method(*given, **arguments), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(method(views, **arguments), method(views))


def test_cmc_labels_that_do_not_go_with_the_objective(impl):
    views, labels = batches(0), torch.tensor([0, 1, 0, 2, 1, 2, 2])
    with pytest.raises(ValueError, match=r"labels: expected an objective of supcon_out.*'pairwise'"):
        sk.methods.CMC(encoder(0), head(1), objective="pairwise", impl=impl)(views, labels=labels)
    method = sk.methods.CMC(encoder(0), head(1), objective="supcon_out", core_view=0, impl=impl)
    with pytest.raises(ValueError, match="core_view: expected None together with labels"):
        method(views, labels=labels)
    method = sk.methods.CMC(encoder(0), head(1), objective="supcon_out", impl=impl)
    with pytest.raises(ValueError, match=r"labels: expected shape \(7,\)"):
        method(views, labels=labels[:4])


def test_cmc_different_inputs_per_view(impl):
    """Views may have different shapes, for example with an image and a text encoder."""
    torch.manual_seed(0)
    method = sk.methods.CMC([nn.Linear(3, 4), nn.Linear(9, 4)], [nn.Identity(), nn.Identity()], impl=impl)
    x, y = randn(6, 3), randn(6, 9)
    z = F.normalize(method.encoder[0](x), dim=-1), F.normalize(method.encoder[1](y), dim=-1)
    logits, target = z[0] @ z[1].T / 0.07, torch.arange(6)
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(method(x, y), clip)
    torch.testing.assert_close(method.embed(y, view=1), method.encoder[1](y))


def test_cmc_state_and_copies(impl):
    method = sk.methods.CMC([encoder(0), encoder(1)], head(2), learnable_temperature=True, impl=impl)
    other = sk.methods.CMC([encoder(5), encoder(6)], head(7), 0.5, learnable_temperature=True, impl=impl)
    other.load_state_dict(method.state_dict())
    views = batches(0)
    assert torch.equal(other.eval()(views), method.eval()(views))
    assert torch.equal(copy.deepcopy(method)(views), method(views))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, nn.Identity()), TypeError, "encoder"),
        (([nn.Identity()], nn.Identity()), ValueError, "encoder.*at least 2"),
        (([nn.Identity(), "f"], nn.Identity()), TypeError, r"encoder\[1\]"),
        (([nn.Identity()] * 2, [nn.Identity()] * 3), ValueError, "projector.*2.*3"),
        ((nn.Identity(), nn.Identity(), -1.0), ValueError, "temperature"),
    ],
)
def test_cmc_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.methods.CMC(*arguments)


def test_cmc_bad_views(impl):
    method = sk.methods.CMC([encoder(0), encoder(1)], head(2), impl=impl)
    with pytest.raises(ValueError, match="views: expected at least 2"):
        method(batches(0)[0])
    with pytest.raises(ValueError, match="views: expected 2, one per encoder or projector, got 3"):
        method(batches(0, 3))
