"""The drop-ins for open_clip's ClipLoss and SigLipLoss against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from selfsup_kernels.compat.open_clip import ClipLoss, SigLipLoss


def eager(image, text, scale):
    """Cross-entropy over the matrix of scores, in both directions (arXiv:2103.00020, figure 3)."""
    scores = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def features(batch=9, dim=7, dtype=torch.float64, unit=True):
    image, text = randn(batch, dim, dtype=dtype), randn(batch, dim, dtype=dtype, seed=1)
    text = text + 0.5 * image
    return (F.normalize(image, dim=-1), F.normalize(text, dim=-1)) if unit else (image, text)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("scale", [14.3, 2.0])
def test_value_and_gradients(scale, unit):
    inputs = [*features(unit=unit), torch.tensor(scale, dtype=torch.float64)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, want = ClipLoss()(*leaves), eager(*leaves)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(ClipLoss()(*inputs[:2], scale), want.detach())


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scale_takes_its_gradient_in_its_own_dtype_and_shape(shape, dtype):
    image, text = features(dtype=torch.float32)
    scale = torch.full(shape, 10.0, dtype=dtype, requires_grad=True)
    ClipLoss()(image, text, scale).backward()
    wide = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(eager(image.double(), text.double(), wide), wide)
    assert scale.grad.shape == shape
    assert scale.grad.dtype == dtype
    torch.testing.assert_close(scale.grad.double().reshape(()), want, rtol=1e-3, atol=1e-6)


def test_a_bias_changes_nothing_and_has_a_gradient_of_zero():
    image, text = features()
    bias = torch.tensor([-10.0], requires_grad=True)
    loss = ClipLoss()(image, text, 10.0, logit_bias=bias, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(loss.detach(), eager(image, text, 10.0))
    assert loss.shape == ()
    loss.backward()
    assert bias.grad.tolist() == [0]


def test_one_sample():
    leaves = [x.requires_grad_() for x in (*features(1), torch.tensor(10.0))]
    loss = ClipLoss()(*leaves)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_the_loss_has_no_state():
    assert not ClipLoss(cache_labels=True).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_horovod": True}, "use_horovod.*torch.distributed"),
        ({"local_loss": True, "world_size": 2}, "local_loss.*wrong direction.*gather_with_grad=True"),
    ],
)
def test_unsupported_arguments_raise(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ClipLoss(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_features": [1.0]}, TypeError, "image_features.*list"),
        ({"text_features": torch.zeros(3, 7)}, ValueError, r"text_features.*\(9, 7\).*\(3, 7\)"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale.*> 0"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale.*one element"),
        ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias.*one element"),
    ],
)
def test_bad_input(change, error, message):
    image, text = features(dtype=torch.float32)
    with pytest.raises(error, match=message):
        ClipLoss()(**({"image_features": image, "text_features": text, "logit_scale": 10.0} | change))


def test_several_processes_without_torch_distributed():
    with pytest.raises(RuntimeError, match=r"world_size.*1, got 2"):
        ClipLoss(world_size=2, gather_with_grad=True)(*features(), 10.0)


def eager_siglip(image, text, scale, bias):
    """The sum over all pairs, divided by the batch (arXiv:2303.15343)."""
    scores = scale * image @ text.T + bias
    return -F.logsigmoid(scores * (2 * torch.eye(len(image)) - 1)).sum() / len(image)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("batch", [1, 9])
def test_siglip_value_and_gradients(batch, unit):
    scalars = torch.tensor(9.0, dtype=torch.float64), torch.tensor([-7.0], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*features(batch, unit=unit), *scalars)]
    loss, want = SigLipLoss()(*leaves, output_dict=True)["contrastive_loss"], eager_siglip(*leaves)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves))
    torch.testing.assert_close(SigLipLoss()(*leaves[:2], 9.0, None), eager_siglip(*leaves[:2], 9.0, 0.0))


def test_siglip_overridden_hooks_count():
    class Margin(SigLipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            return super().get_logits(image_features, text_features, logit_scale, logit_bias) + torch.eye(9)

    class Softer(SigLipLoss):
        def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
            return 0.5 * super().get_ground_truth(device, dtype, num_logits, negative_only)

    image, text = features()
    scores, sign = 9 * image @ text.T - 7, 2 * torch.eye(9) - 1
    want = -F.logsigmoid((scores + torch.eye(9)) * sign).sum() / 9
    torch.testing.assert_close(Margin()(image, text, 9.0, -7.0), want)
    torch.testing.assert_close(Softer()(image, text, 9.0, -7.0), -F.logsigmoid(scores * sign / 2).sum() / 9)
    with pytest.raises(RuntimeError, match="world_size > 1"):
        Margin(world_size=2)(image, text, 9.0, -7.0)
    with pytest.raises(RuntimeError, match="_loss"):
        type("Mine", (SigLipLoss,), {"_loss": lambda self: None})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_features": [1.0]}, TypeError, "image_features.*list"),
        ({"text_features": torch.zeros(3, 7)}, ValueError, r"text_features.*\(9, 7\).*\(3, 7\)"),
        ({"image_features": torch.ones(9, 7, dtype=torch.int64)}, TypeError, "^image_features: expected float64"),
        (
            {"text_features": torch.ones(9, 7, dtype=torch.float64)},
            TypeError,
            "^text_features: expected the dtype",
        ),
        ({"image_features": torch.ones(0, 7), "text_features": torch.ones(0, 7)}, ValueError, "^image_features.*empty"),
        ({"logit_scale": 0.0}, ValueError, "^logit_scale.*> 0"),
        ({"logit_scale": "10"}, TypeError, "^logit_scale.*str"),
        ({"logit_scale": torch.ones(2)}, ValueError, "^logit_scale.*one element"),
        ({"logit_bias": torch.ones(2)}, ValueError, "^logit_bias.*one element"),
        ({"logit_bias": "0"}, TypeError, "^logit_bias.*str"),
    ],
)
def test_siglip_bad_input(change, error, message):
    image, text = features(dtype=torch.float32)
    good = {"image_features": image, "text_features": text, "logit_scale": 10.0, "logit_bias": -10.0}
    with pytest.raises(error, match=message):
        SigLipLoss()(**(good | change))


def test_siglip_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="dist_impl: expected one of bidir, shift, reduce, gather, got 'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(RuntimeError, match=r"world_size.*1, got 2"):
        SigLipLoss(world_size=2)(*features(), 10.0, -10.0)
