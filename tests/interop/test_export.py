"""Test that exported encoders load strictly into torchvision's and timm's backbones and give the same outputs."""

import pytest
import timm
import torch
import torchvision
from interop.helpers import rows
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import selfsup_kernels as sk

export = sk.methods.export_encoder


def headless_resnet():
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    return encoder


def sequence_resnet():
    """Return a backbone without its head, made as in lightly."""
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())


def headless_vit():
    encoder = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64)
    encoder.heads = nn.Identity()
    return encoder


ENCODERS = {
    "torchvision resnet18": (headless_resnet, torchvision.models.resnet18, 512),
    "torchvision resnet18 in a sequence": (sequence_resnet, torchvision.models.resnet18, 512),
    "torchvision vit": (headless_vit, lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64), 32),
    "timm resnet18": (
        lambda: timm.create_model("resnet18", num_classes=0),
        lambda: timm.create_model("resnet18", num_classes=10),
        512,
    ),
    "timm vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10),
        192,
    ),
}


def images(size=32, count=2):
    return rows(count, 3, size, size, seed=5, spread=False)


def without_head(backbone):
    """Replace the classifier of a whole backbone by the identity, so that it returns features."""
    name = next(n for n in ("fc", "heads", "head") if hasattr(backbone, n))
    setattr(backbone, name, nn.Identity())
    return backbone.eval()


def pretrained(name, method="BYOL"):
    """Return a method whose online network and target differ, and whose BatchNorm layers have seen images."""
    torch.manual_seed(0)
    make, _, width = ENCODERS[name]
    head = nn.Linear(width, 8)
    if method == "BYOL":
        method = sk.methods.BYOL(make(), head, nn.Linear(8, 8), 0.5)
    elif method == "MoCo":
        method = sk.methods.MoCo(make(), head, 16, momentum=0.5)
    else:
        method = sk.methods.SimCLR(make(), head)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
        if "resnet" in name:
            method(images(48, 8), images(48, 8) + 0.1)
    if hasattr(method, "update_target"):
        method.update_target()
    return method.eval()


@pytest.mark.parametrize("network", ["online", "target"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()  # attention takes another path if gradients are enabled
def test_a_whole_backbone_loads_strictly_and_gives_the_same_features(name, network):
    method = pretrained(name)
    encoder = method.encoder if network == "online" else method.target.module.encoder
    backbone = ENCODERS[name][1]()
    sources = {"method": method, "state_dict": method.state_dict()}
    sources["Lightning"] = {"state_dict": {f"method.{k}": v for k, v in method.state_dict().items()}}
    sources["DDP"] = {f"module.{k}": v for k, v in method.state_dict().items()}
    sources["compiled"] = {f"_orig_mod.{k}": v for k, v in method.state_dict().items()}
    want = encoder(images())
    for kind, source in sources.items():
        backbone = ENCODERS[name][1]()
        state = export(source, network=network, backbone=backbone)
        assert type(state).__name__ == "OrderedDict"
        assert all(type(v) is torch.Tensor for v in state.values())
        result = backbone.load_state_dict(state, strict=True)
        assert not result.missing_keys, kind
        assert not result.unexpected_keys, kind
        assert torch.equal(without_head(backbone)(images()), want), kind
    if network == "target":
        assert not torch.equal(method.encoder(images()), want)


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm resnet18", "timm vit_tiny", "torchvision vit"])
@pytest.mark.parametrize("method", ["SimCLR", "MoCo"])
@torch.no_grad()
def test_a_headless_backbone_loads_without_the_backbone_argument(name, method):
    method = pretrained(name, method).eval()
    backbone = ENCODERS[name][0]().eval()
    backbone.load_state_dict(export(method), strict=True)
    assert torch.equal(backbone(images()), method.encoder(images()))


def test_a_head_with_another_number_of_classes_is_kept():
    backbone = torchvision.models.resnet18(num_classes=7)
    head = backbone.fc.weight.clone()
    state = export(torchvision.models.resnet18(), backbone=backbone)
    backbone.load_state_dict(state, strict=True)
    assert torch.equal(backbone.fc.weight, head)


@pytest.mark.parametrize("name", ["torchvision resnet18", "torchvision resnet18 in a sequence"])
def test_detection_and_segmentation_backbones(name):
    """Weights load into a detector's ``body`` (FrozenBatchNorm2d) and a segmentation model's layers, without a head."""
    method = pretrained(name)
    x = images(64)
    want = torchvision.models.resnet18()
    want.load_state_dict(export(method, backbone=want))
    layers = nn.Sequential(*list(want.eval().children())[:-2])
    detector = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    ).eval()
    detector.body.load_state_dict(export(method, backbone=detector.body), strict=True)
    torch.testing.assert_close(detector.body(x)["3"], layers(x), rtol=1e-4, atol=1e-4)
    segmenter = IntermediateLayerGetter(torchvision.models.resnet18(), {"layer4": "out"}).eval()
    segmenter.load_state_dict(export(method, backbone=segmenter), strict=True)
    assert torch.equal(segmenter(x)["out"], layers(x))


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"backbone: .*layer1.0.conv3.weight is missing"):
        export(headless_resnet(), backbone=torchvision.models.resnet50())
    with pytest.raises(ValueError, match=r"backbone: .*is missing"):
        export(headless_resnet(), backbone=timm.create_model("vit_tiny_patch16_224"))
