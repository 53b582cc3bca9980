"""Test that the loss modules pass every argument to the function, and that bad ones fail at construction."""

import math

import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.31},
        {"objective": "cross_view", "core_view": 1},
        {"objective": "decoupled", "reduction": "none"},
        {"normalize": False, "temperature": 2.0},
        {"eps": 10.0, "reduction": "sum"},
    ],
)
def test_info_nce_is_the_functional(impl, arguments):
    views = randn(3, 6, 5)
    module = sk.InfoNCELoss(**arguments, impl=impl)
    expected = sk.info_nce_loss(views, **arguments, impl=impl)
    for got in (module(views), module(list(views)), module(*views)):
        assert torch.equal(got, expected)
    if arguments:
        assert not torch.equal(expected, sk.info_nce_loss(views, impl=impl))
    assert not list(module.parameters())


def test_info_nce_labels_and_queue(impl):
    views, labels, queue = randn(2, 6, 5), torch.tensor([0, 1, 0, 2, 1, 2]), randn(9, 5, seed=1)
    module = sk.InfoNCELoss(impl=impl)
    plain = module(views)
    assert torch.equal(module(*views, labels=labels), sk.info_nce_loss(views, labels=labels, impl=impl))
    assert torch.equal(module(views, queue=queue), sk.info_nce_loss(views, queue=queue, impl=impl))
    assert not torch.equal(module(views, labels=labels), plain)
    assert not torch.equal(module(views, queue=queue), plain)


def test_learnable_temperature(impl):
    views = randn(2, 8, 4)
    module = sk.InfoNCELoss(0.2, learnable_temperature=True, impl=impl)
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]
    assert module.logit_scale.item() == pytest.approx(math.log(5))
    assert module.temperature.item() == pytest.approx(0.2)
    loss = module(views)
    loss.backward()
    # d loss / d log(1/t) = -t d loss / d t
    t = torch.tensor(0.2, requires_grad=True)
    expected = sk.info_nce_loss(views, temperature=t, impl=impl)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert module.logit_scale.grad.item() == pytest.approx(-0.2 * t.grad.item(), rel=1e-5)


def test_learnable_temperature_stays_positive(impl):
    """The temperature stays positive after a step that would make a plain parameter negative."""
    views, rate = randn(2, 8, 4), 20.0
    raw = torch.tensor(0.5, requires_grad=True)
    (-sk.info_nce_loss(views, temperature=raw, impl=impl)).backward()
    assert raw.item() - rate * raw.grad.item() < 0
    module = sk.InfoNCELoss(0.5, learnable_temperature=True, impl=impl)
    (-module(views)).backward()
    torch.optim.SGD(module.parameters(), lr=rate).step()
    assert 0 < module.temperature.item() < 0.5


def test_max_scale_holds_the_parameter_and_lets_it_come_back(impl):
    views = randn(2, 8, 4)
    module = sk.InfoNCELoss(0.1, learnable_temperature=True, max_scale=20.0, impl=impl)
    with torch.no_grad():
        module.logit_scale.fill_(7.0)
    assert module.temperature.item() == pytest.approx(1 / 20)
    module.eval()(views)
    assert module.logit_scale.item() == 7.0  # evaluation mode does not clamp
    loss = module.train()(views)
    assert module.logit_scale.item() == pytest.approx(math.log(20))
    assert loss.item() == pytest.approx(sk.info_nce_loss(views, temperature=1 / 20, impl=impl).item(), rel=1e-5)
    loss.backward()
    assert module.logit_scale.grad.item() != 0
    first, second = module(views), module(views)  # the second call's clamp must not break the first's backward
    (first + second).backward()


def test_learnable_temperature_is_saved():
    module = sk.InfoNCELoss(0.2, learnable_temperature=True)
    other = sk.InfoNCELoss(0.7, learnable_temperature=True)
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == pytest.approx(0.2)
    assert sk.InfoNCELoss(0.2).state_dict() == {}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scale": 3.0, "bias": -1.0}, {"normalize": False}, {"eps": 5.0}, {"reduction": "none"}, {"reduction": "sum"}],
)
def test_siglip_is_the_functional(impl, arguments):
    x, y = randn(2, 6, 5)
    duplicates = torch.tensor([0, 1, 0, 2, 1, 2])
    module = sk.SigLIPLoss(**arguments, learnable=False, impl=impl)
    expected = sk.siglip_loss(x, y, **arguments, impl=impl)
    assert torch.equal(module(x, y), expected)
    assert torch.equal(module(x, y, duplicates), sk.siglip_loss(x, y, duplicates=duplicates, **arguments, impl=impl))
    torch.testing.assert_close(sk.SigLIPLoss(**arguments, impl=impl)(x, y), expected)
    assert not list(module.parameters())
    if arguments:
        assert not torch.equal(expected, sk.siglip_loss(x, y, impl=impl))


@pytest.mark.parametrize("arguments", [{}, {"eps": 5.0}, {"reduction": "none"}, {"reduction": "sum"}])
def test_byol_is_the_functional(impl, arguments):
    p, t = randn(2, 5, 3), randn(2, 5, 3, seed=1)
    module = sk.BYOLLoss(**arguments, impl=impl)
    expected = sk.byol_loss(p, t, **arguments, impl=impl)
    assert torch.equal(module(p, t), expected)
    assert torch.equal(module(list(p), list(t)), expected)
    assert torch.equal(module(p[0], t[0]), sk.byol_loss(p[0], t[0], **arguments, impl=impl))
    if arguments:
        assert not torch.equal(expected, sk.byol_loss(p, t, impl=impl))


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (sk.InfoNCELoss, {"temperature": 0}, ValueError, "temperature"),
        (sk.InfoNCELoss, {"temperature": math.nan}, ValueError, "temperature"),
        (sk.InfoNCELoss, {"temperature": -1.0, "learnable_temperature": True}, ValueError, "temperature"),
        (sk.InfoNCELoss, {"temperature": "0.1"}, TypeError, "temperature"),
        (sk.InfoNCELoss, {"objective": "ntxent"}, ValueError, "objective.*supcon_out.*ntxent"),
        (sk.InfoNCELoss, {"reduction": "avg"}, ValueError, "reduction.*avg"),
        (sk.InfoNCELoss, {"impl": "fast"}, ValueError, "impl"),
        (sk.InfoNCELoss, {"eps": 0.0}, ValueError, "eps"),
        (sk.InfoNCELoss, {"core_view": -1}, ValueError, "core_view"),
        (sk.InfoNCELoss, {"core_view": True}, ValueError, "core_view"),
        (sk.InfoNCELoss, {"max_scale": 100}, ValueError, "max_scale"),
        (sk.InfoNCELoss, {"learnable_temperature": True, "max_scale": 5}, ValueError, "max_scale.*10"),
        (sk.SigLIPLoss, {"scale": 0}, ValueError, "scale"),
        (sk.SigLIPLoss, {"scale": "10"}, TypeError, "scale"),
        (sk.SigLIPLoss, {"bias": math.nan}, ValueError, "bias"),
        (sk.SigLIPLoss, {"reduction": "avg"}, ValueError, "reduction.*avg"),
        (sk.SigLIPLoss, {"eps": 0.0}, ValueError, "eps"),
        (sk.SigLIPLoss, {"impl": "fast"}, ValueError, "impl"),
        (sk.BYOLLoss, {"reduction": "avg"}, ValueError, "reduction"),
        (sk.BYOLLoss, {"eps": -1}, ValueError, "eps"),
        (sk.BYOLLoss, {"impl": 3}, ValueError, "impl"),
    ],
)
def test_bad_arguments_fail_at_construction(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_repr_shows_arguments_that_are_not_defaults():
    text = repr(sk.InfoNCELoss(0.07, learnable_temperature=True, max_scale=100, objective="cross_view"))
    for part in ("temperature=0.07", "learnable_temperature=True", "max_scale=100", "objective='cross_view'"):
        assert part in text
    assert "eps" not in text
    text = repr(sk.SigLIPLoss(5.0, learnable=False, group="local"))
    assert text == "SigLIPLoss(scale=5, bias=-10, learnable=False, group='local')"
    assert "reduction='sum'" in repr(sk.BYOLLoss(reduction="sum"))


def test_as_a_submodule_it_moves_and_compiles(impl):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.loss = sk.InfoNCELoss(learnable_temperature=True, max_scale=50.0, impl=impl)

        def forward(self, x):
            return self.loss(self.net(x), self.net(x + 1))

    torch._dynamo.reset()
    model, x = Model().double(), randn(6, 4, dtype=torch.float64)
    assert model.loss.logit_scale.dtype == torch.float64
    expected = model(x)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    got.backward()
    assert model.loss.logit_scale.grad.isfinite()
