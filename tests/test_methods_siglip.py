"""SigLIP as a method: its loss is that of its towers' outputs, a few training steps equal plain code."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within, randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels import spec

CAPTIONS = torch.tensor([0, 1, 2, 0, 4, 1, 6])


def towers(seed=0):
    """Return an image and a text tower for inputs of different widths."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), nn.Linear(4, 5)


def pairs(step=0, samples=7, dtype=torch.float32):
    return randn(samples, 6, seed=step, dtype=dtype), randn(samples, 4, seed=100 + step, dtype=dtype)


@pytest.mark.parametrize("duplicates", [None, CAPTIONS])
def test_value_and_gradient_are_those_of_the_loss_of_the_towers(impl, duplicates):
    method = sk.methods.SigLIP(*towers(), scale=7.0, bias=-3.0, impl=impl)
    images, texts = pairs()
    loss = method(images, texts, duplicates)
    loss.backward()
    image_tower, text_tower = (copy.deepcopy(t).double() for t in (method.image_tower, method.text_tower))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (math.log(7), -3.0))
    expected = spec.siglip_loss(
        image_tower(images.double()), text_tower(texts.double()), scale=scale.exp(), bias=bias, duplicates=duplicates
    )
    for tower in (image_tower, text_tower):
        tower.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, plain in ((method.image_tower, image_tower), (method.text_tower, text_tower)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.loss.logit_scale.grad.double().squeeze(), scale.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.loss.logit_bias.grad.double().squeeze(), bias.grad, rtol=1e-4, atol=1e-6)


def test_training_equals_plain_code(impl):
    """Training equals Algorithm 1 of the paper, which has the matrix of scores, step by step."""
    method = sk.methods.SigLIP(*towers(), impl=impl)
    f, g = copy.deepcopy(method.image_tower), copy.deepcopy(method.text_tower)
    t, b = (nn.Parameter(torch.tensor(v)) for v in (math.log(10), -10.0))
    ours = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    plain = torch.optim.SGD([*f.parameters(), *g.parameters(), t, b], lr=0.1, momentum=0.9)
    for step in range(4):
        images, texts = pairs(step)
        logits = F.normalize(f(images), dim=-1) @ F.normalize(g(texts), dim=-1).T * t.exp() + b
        expected = -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)
        loss = method(images, texts)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for optimizer, value in ((ours, loss), (plain, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for p, q in zip(method.parameters(), [*f.parameters(), *g.parameters(), t, b], strict=True):
        torch.testing.assert_close(p.view_as(q), q, rtol=1e-4, atol=1e-5)


def test_learnable_scalars(impl):
    method = sk.methods.SigLIP(*towers(), impl=impl)
    names = {name for name, _ in method.named_parameters()}
    assert {"loss.logit_scale", "loss.logit_bias"} <= names
    assert method.loss.logit_scale.exp().item() == pytest.approx(10)
    assert method.loss.logit_bias.item() == -10
    fixed = sk.methods.SigLIP(*towers(), scale=3.0, bias=-1.0, learnable=False, impl=impl)
    assert not [name for name, _ in fixed.named_parameters() if name.startswith("loss.")]
    images, texts = pairs()
    expected = sk.siglip_loss(fixed.embed_image(images), fixed.embed_text(texts), scale=3.0, bias=-1.0, impl=impl)
    assert torch.equal(fixed(images, texts), expected)
    assert not torch.equal(fixed(images, texts), method(images, texts))


def test_embeddings_are_those_of_the_towers_and_not_normalised():
    image_tower, text_tower = towers()
    method = sk.methods.SigLIP(image_tower, text_tower)
    images, texts = pairs()
    assert method.image_tower is image_tower
    assert torch.equal(method.embed_image(images), image_tower(images))
    assert torch.equal(method.embed_text(texts), text_tower(texts))


def test_eps_reaches_the_loss(impl):
    images, texts = pairs()
    method = sk.methods.SigLIP(*towers(), eps=9.0, impl=impl)
    expected = sk.siglip_loss(method.embed_image(images), method.embed_text(texts), eps=9.0, impl=impl)
    torch.testing.assert_close(method(images, texts), expected)
    assert method.loss.impl == impl


def test_a_locked_tower_gets_no_gradient(impl):
    """Locked-image tuning."""
    method = sk.methods.SigLIP(*towers(), impl=impl)
    method.image_tower.requires_grad_(False)
    method(*pairs()).backward()
    assert all(p.grad is None for p in method.image_tower.parameters())
    assert all(p.grad.count_nonzero() for p in method.text_tower.parameters())


def test_state_and_copies(impl):
    method = sk.methods.SigLIP(*towers(), impl=impl)
    other = sk.methods.SigLIP(*towers(5), scale=2.0, bias=1.0, impl=impl)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    images, texts = pairs()
    assert torch.equal(other(images, texts), method(images, texts))
    twin = copy.deepcopy(method)
    assert torch.equal(twin(images, texts), method(images, texts))
    with torch.no_grad():
        twin.loss.logit_bias.add_(1)
    assert method.loss.logit_bias.item() == -10
    assert not torch.equal(twin(images, texts), method(images, texts))


@pytest.mark.parametrize("group", ["world", "local"])
def test_one_process_is_the_world(impl, group):
    images, texts = pairs()
    plain, method = (sk.methods.SigLIP(*towers(), group=g, impl=impl) for g in (None, group))
    assert torch.equal(method(images, texts), plain(images, texts))
    assert f"group={group!r}" in repr(method)


def test_chunks_give_the_gradient_of_the_whole_batch(impl):
    whole = sk.methods.SigLIP(*towers(), impl=impl).double()
    method = copy.deepcopy(whole)
    images, texts = pairs(dtype=torch.float64)
    loss = whole(images, texts, CAPTIONS)
    loss.backward()
    value = sk.chunked_backward(
        [method.image_tower, method.text_tower], [images, texts], lambda z: method.loss(*z, CAPTIONS), chunk_size=3
    )
    assert_within("loss", value, loss.detach())
    for p, q in zip(method.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_compiles_in_one_graph(impl):
    torch._dynamo.reset()
    method = sk.methods.SigLIP(*towers(), impl=impl)
    images, texts = pairs()
    expected = method(images, texts)
    loss = torch.compile(method, fullgraph=True, backend="aot_eager")(images, texts)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert method.loss.logit_scale.grad.isfinite()


@pytest.mark.parametrize(
    ("arguments", "named", "error", "message"),
    [
        ((lambda x: x, nn.Identity()), {}, TypeError, "image_tower: expected an nn.Module, got function"),
        ((nn.Identity(), None), {}, TypeError, "text_tower: expected an nn.Module, got NoneType"),
        ((nn.Identity(), nn.Identity()), {"scale": 0.0}, ValueError, "scale"),
        ((nn.Identity(), nn.Identity()), {"bias": math.inf}, ValueError, "bias"),
        ((nn.Identity(), nn.Identity()), {"eps": -1.0}, ValueError, "eps"),
        ((nn.Identity(), nn.Identity()), {"group": "all"}, TypeError, "group"),
        ((nn.Identity(), nn.Identity()), {"impl": "fast"}, ValueError, "impl"),
        ((nn.Identity(), nn.Identity(), 10.0), {}, TypeError, "positional"),
    ],
)
def test_bad_arguments(arguments, named, error, message):
    with pytest.raises(error, match=message):
        sk.methods.SigLIP(*arguments, **named)


def test_bad_inputs(impl):
    method = sk.methods.SigLIP(*towers(), impl=impl)
    images, texts = pairs()
    with pytest.raises(ValueError, match=r"y: expected the shape of x, \(7, 5\), got \(6, 5\)"):
        method(images, texts[:6])
    with pytest.raises(ValueError, match=r"x: expected a \(B, D\) tensor, got shape \(7, 2, 5\)"):
        method(images[:, None].expand(-1, 2, -1), texts)
    with pytest.raises(ValueError, match=r"duplicates: expected shape \(7,\)"):
        method(images, texts, CAPTIONS[:3])
    with pytest.raises(TypeError, match="duplicates"):
        method(images, texts, CAPTIONS.float())
