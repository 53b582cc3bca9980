"""Export of encoders as plain state_dicts: prefixes are removed, all weights are kept, and misfits raise.

``tests/interop/test_export.py`` tests torchvision's and timm's backbones.
"""

import copy

import pytest
import torch
from torch import nn

import selfsup_kernels as sk

export = sk.methods.export_encoder


class Backbone(nn.Module):
    """Names as in torchvision: ``conv``, ``bn``, and a head ``fc``."""

    def __init__(self, classes=None):
        super().__init__()
        self.conv, self.relu, self.bn = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Identity() if classes is None else nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.flatten(self.pool(self.bn(self.relu(self.conv(x))))))


def make(name, encoder=None):
    encoder = Backbone() if encoder is None else encoder
    if name == "CMC":
        return sk.methods.CMC([encoder, copy.deepcopy(encoder)], nn.Linear(4, 3))
    if name == "MoCo":
        return sk.methods.MoCo(encoder, nn.Linear(4, 3), 8)
    if name == "SigLIP":
        return sk.methods.SigLIP(copy.deepcopy(encoder), encoder)
    heads = [nn.Linear(4, 3)] + ([nn.Linear(3, 3)] if name.startswith("BYOL") else [])
    return getattr(sk.methods, name)(encoder, *heads)


METHODS = ["SimCLR", "MoCo", "BYOL", "BYOLContrast", "CMC", "SigLIP"]


def moved(module, seed=0):
    """Change all tensors of the module, to values that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() + 0.5)
    return module


def assert_same_state(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
        assert not got[name].requires_grad


def encoder_of(method, network):
    if isinstance(method, sk.methods.SigLIP):
        return method.text_tower
    inside = method if network == "online" else method.target.module
    return inside.encoder[1] if isinstance(inside.encoder, nn.ModuleList) else inside.encoder


CASES = [(m, "online") for m in METHODS] + [(m, "target") for m in METHODS if m not in ("SimCLR", "CMC", "SigLIP")]


@pytest.mark.parametrize(("name", "network"), CASES)
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.method."])
def test_from_methods_and_their_state_dicts(name, network, wrapped):
    method = moved(make(name))
    want = encoder_of(method, network).state_dict()
    view = {"view": 1} if name in ("CMC", "SigLIP") else {}
    got = export(method, network=network, **view)
    assert_same_state(got, want)
    Backbone().load_state_dict(got, strict=True)
    checkpoint = {wrapped + key: value for key, value in method.state_dict().items()}
    assert_same_state(export(checkpoint, network=network, **view), want)
    assert_same_state(export({"state_dict": checkpoint, "epoch": 3}, network=network, **view), want)


def test_shared_encoder_in_cmc_and_an_encoder_that_has_an_encoder():
    """Like a torchvision ViT, whose own names start with ``encoder.``."""
    vit = nn.Module()
    vit.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    vit.class_token = nn.Parameter(torch.zeros(2))
    method = moved(sk.methods.CMC(vit, nn.Linear(2, 2)))
    assert_same_state(export(method), vit.state_dict())
    assert_same_state(export(method.state_dict()), vit.state_dict())
    assert_same_state(export(vit.state_dict()), vit.state_dict())


class Pair(nn.Module):
    """A user's encoder of two inputs, with the names of SigLIP's towers."""

    def __init__(self):
        super().__init__()
        self.image_tower, self.text_tower = Backbone(), Backbone()


def test_the_towers_of_siglip():
    method = moved(sk.methods.SigLIP(Backbone(), nn.Identity(), learnable=False))
    for source in (method, method.state_dict(), sk.EMA(method)):
        assert_same_state(export(source, view=0), method.image_tower.state_dict())
    assert_same_state(export(method.state_dict(), prefix="image_tower"), method.image_tower.state_dict())
    # Towers in an encoder, and an encoder in a tower: the outer one counts.
    simclr = moved(sk.methods.SimCLR(Pair(), nn.Linear(4, 3)))
    for source in (simclr, simclr.state_dict(), {f"encoder.{k}": v for k, v in simclr.encoder.state_dict().items()}):
        assert_same_state(export(source), simclr.encoder.state_dict())
    byol = moved(sk.methods.BYOL(Pair(), nn.Linear(4, 3), nn.Linear(3, 3)))
    for network in ("online", "target"):
        assert_same_state(export(byol.state_dict(), network=network), encoder_of(byol, network).state_dict())
    method = moved(sk.methods.SigLIP(make("SimCLR"), make("SimCLR")))
    for source in (method.state_dict(), {f"model.{k}": v for k, v in method.state_dict().items()}):
        assert_same_state(export(source, view=1), method.text_tower.state_dict())
    pair = moved(Pair())
    assert_same_state(export(pair), pair.state_dict())
    assert_same_state(export(pair.state_dict(), prefix=""), pair.state_dict())


def test_a_sequence_is_not_taken_for_one_encoder_per_view():
    method = moved(sk.methods.SimCLR(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)))
    assert_same_state(export(method.state_dict()), method.encoder.state_dict())


def test_without_a_projector():
    method = moved(sk.methods.BYOL(Backbone(), nn.Identity(), nn.Linear(4, 4)))
    for network in ("online", "target"):
        assert_same_state(export(method.state_dict(), network=network), encoder_of(method, network).state_dict())
    simclr = moved(sk.methods.SimCLR(Backbone(), nn.Identity()))
    assert_same_state(export(simclr.state_dict()), simclr.encoder.state_dict())


def test_compiled_and_parallel_modules_inside():
    method = moved(make("BYOL", torch.compile(Backbone(), backend="eager")))
    want = method.online.encoder._orig_mod.state_dict()
    assert_same_state(export(method), want)
    assert_same_state(export(method.state_dict()), want)
    assert_same_state(export(torch.compile(method, backend="eager")), want)
    parallel = moved(make("SimCLR", nn.DataParallel(Backbone())))
    assert_same_state(export(parallel), parallel.encoder.module.state_dict())
    assert_same_state(export(parallel.state_dict()), parallel.encoder.module.state_dict())
    assert_same_state(export(nn.DataParallel(parallel)), parallel.encoder.module.state_dict())


def test_encoders_ema_and_a_given_prefix():
    encoder = moved(Backbone())
    assert_same_state(export(encoder), encoder.state_dict())
    ema = sk.EMA(encoder)
    moved(encoder, seed=1)
    assert_same_state(export(ema), ema.module.state_dict())
    method = make("BYOL")
    assert_same_state(export(sk.EMA(method)), method.encoder.state_dict())
    state = {f"trunk.visual.{k}": v for k, v in encoder.state_dict().items()} | {"trunk.text.weight": torch.ones(1)}
    for prefix in ("trunk.visual", "trunk.visual."):
        assert_same_state(export(state, prefix=prefix), encoder.state_dict())


def test_the_result_is_a_copy():
    method = make("SimCLR")
    state = export(method)
    before = state["conv.weight"].clone()
    with torch.no_grad():
        method.encoder.conv.weight.add_(1)
    assert torch.equal(state["conv.weight"], before)


def test_heads_come_from_the_backbone():
    encoder, backbone = moved(Backbone()), moved(Backbone(10), seed=3)
    head = backbone.fc.weight.clone()
    state = export(make("SimCLR", encoder), backbone=backbone)
    assert list(state) == list(backbone.state_dict())
    backbone.load_state_dict(state, strict=True)
    assert torch.equal(backbone.fc.weight, head)
    assert torch.equal(backbone.conv.weight, encoder.conv.weight)
    # A head that the backbone lacks, or one with another number of classes.
    with_head = moved(Backbone(7))
    assert list(export(with_head, backbone=Backbone())) == list(Backbone().state_dict())
    assert export(with_head, backbone=backbone)["fc.weight"].shape == (10, 4)
    same = export(with_head, backbone=Backbone(7))
    assert torch.equal(same["fc.weight"], with_head.fc.weight)


def test_children_in_a_sequence_get_their_names():
    backbone = Backbone(10)
    encoder = moved(nn.Sequential(*list(Backbone().children())[:-1]))
    state = export(make("SimCLR", encoder), backbone=backbone)
    backbone.load_state_dict(state, strict=True)
    backbone.fc = nn.Identity()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(backbone.eval()(x), encoder.eval()(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: export(3), TypeError, "source: expected a module or a state_dict, got int"),
        (lambda: export(make("BYOL"), network="teacher"), ValueError, "network: .*online, target.*'teacher'"),
        (lambda: export(make("SimCLR"), network="target"), ValueError, "SimCLR has no target"),
        (lambda: export(make("SimCLR").state_dict(), network="target"), ValueError, "network: .*target.module"),
        (lambda: export(make("CMC"), view=2), ValueError, r"view: .*\[0, 2\), got 2"),
        (lambda: export(make("CMC")), ValueError, r"view: .*\[0, 2\), got None"),
        (lambda: export(make("SigLIP")), ValueError, "view: expected 0 for the image tower or 1 .* got None"),
        (lambda: export(make("SigLIP").state_dict(), view=2), ValueError, "view: expected 0 for the image .* got 2"),
        (lambda: export(make("SigLIP"), network="target"), ValueError, "SigLIP has no target"),
        (lambda: export(make("SigLIP").state_dict(), network="target"), ValueError, "network: .*target.module"),
        (lambda: export(make("BYOL"), view=0), ValueError, "view: expected None, since all views have one encoder"),
        (lambda: export(make("CMC"), prefix="x."), ValueError, "prefix: expected None for a module"),
        (lambda: export(make("CMC").state_dict(), prefix="x."), ValueError, "start with 'x.', got encoder.0.conv"),
        (lambda: export(Backbone(), backbone="resnet"), TypeError, "backbone: expected an nn.Module, got str"),
        (lambda: export(Backbone(), backbone=nn.Linear(2, 2)), ValueError, "weight is missing; bias is missing"),
        (lambda: export(nn.Linear(2, 3), backbone=nn.Linear(2, 2)), ValueError, r"weight is \(3, 2\), expected \(2, 2"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_two_methods_in_one_checkpoint():
    state = {f"{name}.{k}": v for name in ("a", "b") for k, v in make("SimCLR").state_dict().items()}
    with pytest.raises(ValueError, match=r"which of a\., b\. precedes encoder"):
        export(state)
    towers = {f"t.{k}": v for k, v in make("SigLIP").state_dict().items()}
    with pytest.raises(ValueError, match=r"which of a\., b\., t\. precedes the encoder"):
        export(state | towers, view=0)
    assert list(export(state, prefix="b.encoder")) == list(Backbone().state_dict())
