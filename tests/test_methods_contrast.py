"""SimCLR and BYOLContrast against plain float64 code, step by step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec


def encoder(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()).double()


def head(seed, inside=8):
    torch.manual_seed(seed)
    return nn.Linear(inside, 5).double()


def batches(step, num_views=2, samples=7):
    x = randn(samples, 6, seed=step, dtype=torch.float64)
    return [x + (0.3 + 0.2 * v) * randn(samples, 6, seed=100 * (v + 1) + step, dtype=x.dtype) for v in range(num_views)]


def nt_xent(za, zb, temperature):
    """Equation 1 of arXiv:2002.05709: the 2B x 2B matrix without its diagonal, and cross entropy."""
    z = F.normalize(torch.cat([za, zb]), dim=-1)
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(za)))


def one_denominator(rows, temperature):
    """L_out of arXiv:2004.11362 with each sample's views as a class, in loops over anchors."""
    z = [F.normalize(r, dim=-1) for r in rows]
    every = [(v, a) for v in range(len(z)) for a in range(len(z[0]))]
    terms = []
    for u, a in every:
        scores = {(v, b): (z[u][a] * z[v][b]).sum() / temperature for v, b in every if (v, b) != (u, a)}
        total = torch.stack(list(scores.values())).logsumexp(0)
        terms.append(torch.stack([total - s for (_, b), s in scores.items() if b == a]).mean())
    return torch.stack(terms).mean()


def cross_view(rows, temperature):
    z = [F.normalize(r, dim=-1) for r in rows]
    pairs = [(u, v) for u in range(len(z)) for v in range(len(z)) if u != v]
    same = torch.arange(len(z[0]))
    return sum(F.cross_entropy(z[u] @ z[v].T / temperature, same) for u, v in pairs) / len(pairs)


def regression(predictions, targets):
    pairs = [(u, v) for u in range(len(targets)) for v in range(len(targets)) if u != v]
    return sum((2 - 2 * F.cosine_similarity(predictions[u], targets[v])).mean() for u, v in pairs) / len(pairs)


@pytest.mark.parametrize("form", ["paper", "three, one denominator", "three, pairwise"])
def test_simclr_training_equals_plain_code(impl, form):
    objective = "pairwise" if "pairwise" in form else "supcon_out"
    method = sk.methods.SimCLR(encoder(0), head(1), 0.3, objective=objective, impl=impl)
    f, g = copy.deepcopy(method.encoder), copy.deepcopy(method.projector)
    parameters = [*f.parameters(), *g.parameters()]
    optimizer, eager_optimizer = torch.optim.SGD(method.parameters(), lr=0.1), torch.optim.SGD(parameters, lr=0.1)
    for step in range(4):
        views = batches(step, 2 if form == "paper" else 3)
        z = [g(f(x)) for x in views]
        if form == "paper":
            expected = nt_xent(*z, 0.3)
        elif objective == "supcon_out":
            expected = one_denominator(z, 0.3)
        else:
            expected = sum(nt_xent(z[u], z[v], 0.3) for u, v in ((0, 1), (0, 2), (1, 2))) / 3
        loss = method(views) if step % 2 else method(*views)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
        for o, value in ((optimizer, loss), (eager_optimizer, expected)):
            o.zero_grad()
            value.backward()
            o.step()
    for p, e in zip(method.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-9)


def test_simclr_options_reach_the_loss(impl):
    assert sk.methods.SimCLR(encoder(0), head(1)).loss.temperature == 0.5
    method = sk.methods.SimCLR(encoder(0), head(1), learnable_temperature=True, max_scale=50, eps=1e-8, impl=impl)
    assert (method.loss.max_scale, method.loss.eps, method.loss.impl) == (50, 1e-8, impl)
    method(batches(0)).backward()
    assert method.loss.logit_scale.grad.item() != 0
    assert torch.equal(method.eval().embed(batches(0)[0]), method.projector(method.encoder(batches(0)[0])))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, nn.Identity()), TypeError, "encoder"),
        ((nn.Identity(), "mlp"), TypeError, "projector"),
        ((nn.Identity(), nn.Identity(), 0.0), ValueError, "temperature"),
    ],
)
def test_simclr_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sk.methods.SimCLR(*arguments)


def test_simclr_bad_views(impl):
    with pytest.raises(ValueError, match="views: expected at least 2"):
        sk.methods.SimCLR(encoder(0), head(1), impl=impl)(batches(0)[0])


def both(impl="auto", **arguments):
    return sk.methods.BYOLContrast(encoder(0), head(1), head(2, 5), 0.9, 0.2, impl=impl, **arguments)


class EagerBoth:
    """The equation of the docstring, with a deep copy as target."""

    def __init__(self, method):
        self.online, self.predictor = copy.deepcopy(method.online), copy.deepcopy(method.predictor)
        self.target = copy.deepcopy(method.online)

    def parameters(self):
        return [*self.online.parameters(), *self.predictor.parameters()]

    def parts(self, views, temperature, contrast=cross_view):
        z = [self.online(x) for x in views]
        targets = [self.target(x).detach() for x in views]
        return regression([self.predictor(x) for x in z], targets), contrast(z, temperature)

    @torch.no_grad()
    def update(self, m):
        for s, t in zip(self.online.parameters(), self.target.parameters(), strict=True):
            t.copy_(m * t + (1 - m) * s)
        for s, t in zip(self.online.buffers(), self.target.buffers(), strict=True):
            t.copy_(s)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0, 1.5)])
def test_byol_contrast_training_equals_plain_code(impl, num_views, weights):
    method = both(impl, byol_weight=weights[0], contrast_weight=weights[1])
    eager = EagerBoth(method)
    optimizer, eager_optimizer = (torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (method, eager))
    calls = []
    method.online.register_forward_hook(lambda *_: calls.append("online"))
    for step in range(4):
        views = batches(step, num_views)
        parts = eager.parts(views, 0.2)
        expected = weights[0] * parts[0] + weights[1] * parts[1]
        loss = method(*views)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(method.parts["byol"], parts[0].detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(method.parts["contrast"], parts[1].detach(), rtol=1e-9, atol=1e-10)
        assert not any(part.requires_grad for part in method.parts.values())
        for o, value in ((optimizer, loss), (eager_optimizer, expected)):
            o.zero_grad()
            value.backward()
            o.step()
        method.update_target()
        eager.update(0.9)
    assert len(calls) == 4 * num_views, "both losses share one forward of the online network"
    trained = [p for p in method.parameters() if p.requires_grad]
    for p, e in zip(trained, eager.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=1e-8, atol=1e-9)
    for t, e in zip(method.target.module.state_dict().values(), eager.target.state_dict().values(), strict=True):
        torch.testing.assert_close(t, e, rtol=1e-8, atol=1e-9)


def test_byol_contrast_is_its_parts(impl):
    views = batches(0, 3)
    byol = sk.methods.BYOL(encoder(0), head(1), head(2, 5), impl=impl)
    cmc = sk.methods.CMC(encoder(0), head(1), 0.2, impl=impl)
    torch.testing.assert_close(both(impl, contrast_weight=0)(views), byol(views))
    torch.testing.assert_close(both(impl, byol_weight=0)(views), cmc(views))
    for objective in ("supcon_out", "pairwise", "cross_view"):
        method = both(impl, byol_weight=0, objective=objective, core_view=1)
        z = [method.online(x) for x in views]
        expected = spec.info_nce_loss(z, temperature=0.2, objective=objective, core_view=1)
        torch.testing.assert_close(method(views), expected)


def test_byol_contrast_state_weights_and_copies(impl):
    method = both(impl, learnable_temperature=True, byol_weight=0.5)
    method(batches(0)).backward()
    assert method.contrast.logit_scale.grad.item() != 0
    assert "byol_weight=0.5, contrast_weight=1" in repr(method)
    other = both(impl, learnable_temperature=True, byol_weight=0.5)
    other.load_state_dict(method.state_dict(), strict=True)
    views = batches(1)
    assert torch.equal(copy.deepcopy(method).eval()(views), other.eval()(views))
    method.contrast_weight = 0.0
    assert torch.equal(method.eval()(views), 0.5 * method.parts["byol"])


def test_byol_contrast_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    method = both(impl)
    twin, views = copy.deepcopy(method), batches(0)
    loss = torch.compile(method, fullgraph=True, backend="aot_eager")(*views)
    torch.testing.assert_close(loss, twin(*views))
    torch.testing.assert_close(method.parts["contrast"], twin.parts["contrast"])
    loss.backward()
    assert method.predictor.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"byol_weight": -1}, ValueError, "byol_weight: expected a finite number >= 0, got -1"),
        ({"contrast_weight": float("nan")}, ValueError, "contrast_weight"),
        ({"contrast_weight": "1"}, TypeError, "contrast_weight: expected a number, got str"),
        ({"byol_weight": 0, "contrast_weight": 0}, ValueError, "one of them above 0"),
        ({"objective": "triplet"}, ValueError, "objective"),
    ],
)
def test_byol_contrast_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        both(**arguments)


@pytest.mark.parametrize("method", [sk.methods.BYOLContrast, sk.methods.BYOL, sk.methods.MoCo])
def test_an_unknown_impl_is_refused_at_once(method):
    with pytest.raises(ValueError, match="impl: expected one of"):
        method(
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            **({"dim": 3} if method is sk.methods.MoCo else {"predictor": nn.Linear(3, 3)}),
            impl="x",
        )
