"""The drop-in for SupContrast's SupConLoss against the paper's L_out with the repository's factor, in loops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from selfsup_kernels.compat.supcontrast import SupConLoss

BATCH = 6
CLASSES = {
    "none": None,
    "of one": torch.arange(BATCH),
    "of many": torch.tensor([4, 4, -1, 4, -1, 2]),
    "of all": torch.zeros(BATCH, dtype=torch.long),
}


def written_out(features, classes, temperature, base, mode):
    """arXiv:2004.11362, eq. 2, times temperature / base_temperature; anchors of every view or of the first one."""
    batch, views = features.shape[:2]
    rows = [(a, v) for v in range(views) for a in range(batch)]

    def score(i, j):
        return (features[i[0], i[1]] * features[j[0], j[1]]).sum() / temperature

    losses = []
    for anchor in rows if mode == "all" else rows[:batch]:
        others = [row for row in rows if row != anchor]
        positives = [row for row in others if classes[row[0]] == classes[anchor[0]]]
        total = torch.stack([score(anchor, row) for row in others]).logsumexp(0)
        terms = [total - score(anchor, row) for row in positives]
        losses.append(sum(terms) / len(terms) if terms else 0 * total)
    return temperature / base * sum(losses) / len(losses)


def features(views, dim=5, dtype=torch.float64):
    return F.normalize(randn(BATCH, views, dim, dtype=dtype), dim=-1)


def compare(module, x, classes, mode, **arguments):
    x = x.requires_grad_()
    loss = module(x, **arguments)
    want = written_out(x, classes, module.temperature, module.base_temperature, mode)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(want, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize(
    ("case", "views"), [(case, views) for case in CLASSES for views in (1, 2, 3) if case != "none" or views > 1]
)
def test_value_and_gradient(case, views, mode):
    labels = CLASSES[case]
    module = SupConLoss(0.2, mode, base_temperature=0.05)
    classes = (torch.arange(BATCH) if labels is None else labels).tolist()
    compare(module, features(views), classes, mode, labels=labels)


def in_matrices(features, labels, temperature, mode):
    """The same formula for many rows; base temperature 0.07."""
    batch, views = features.shape[:2]
    rows, classes = features.transpose(0, 1).flatten(0, 1), labels.repeat(views)
    others = ~torch.eye(len(rows), dtype=torch.bool)
    positive = (classes[:, None] == classes) & others
    scores = rows @ rows.T / temperature
    total = scores.masked_fill(~others, -torch.inf).logsumexp(1)
    mean = scores.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    return temperature / 0.07 * (total - mean)[: batch if mode == "one" else None].mean()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("classes", [1, 7, 10**6])
def test_float32_with_random_labels(classes, mode, temperature):
    labels = torch.randint(classes, (150,), generator=torch.Generator().manual_seed(0))
    x = F.normalize(randn(150, 2, 24) + 0.5 * randn(24, seed=1), dim=-1).requires_grad_()
    wide = x.detach().double().requires_grad_()
    loss, want = SupConLoss(temperature, mode)(x, labels), in_matrices(wide, labels, temperature, mode)
    grads = torch.autograd.grad(loss, x)[0].double(), torch.autograd.grad(want, wide)[0]
    assert abs(loss.item() - want.item()) <= 2e-5 * want.item()
    assert (grads[0] - grads[1]).norm() <= 2e-5 * grads[1].norm()


def test_defaults_and_features_that_are_not_normalised():
    module = SupConLoss()
    assert (module.temperature, module.base_temperature, module.contrast_mode) == (0.07, 0.07, "all")
    compare(SupConLoss(0.5), 1.7 * randn(BATCH, 2, 5, dtype=torch.float64), range(BATCH), "all")


def test_further_dimensions_are_flattened():
    x = features(2, 12)
    assert SupConLoss()(x.reshape(BATCH, 2, 3, 2, 2)) == SupConLoss()(x)


@pytest.mark.parametrize("labels", [torch.tensor([[0.5], [0.5], [-1], [0.5], [-1], [2]]), CLASSES["of many"] == 4])
def test_labels_of_other_dtypes_and_shapes(labels):
    compare(SupConLoss(0.2), features(2), labels.reshape(-1).tolist(), "all", labels=labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_a_mask_of_classes_is_taken_as_labels(dtype, mode):
    labels = CLASSES["of many"]
    mask = (labels[:, None] == labels[None, :]).to(dtype)
    compare(SupConLoss(0.2, mode), features(2), labels.tolist(), mode, mask=mask)
    mask.fill_diagonal_(0)  # ignored for one view
    compare(SupConLoss(0.2, mode), features(1), labels.tolist(), mode, mask=mask)


def _change(i, j, value):
    mask = (CLASSES["of many"][:, None] == CLASSES["of many"][None, :]).float()
    mask[i, j] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [_change(0, 1, 0), _change(0, 2, 1), _change(3, 3, 0), _change(0, 1, 0.5), _change([0, 2], [2, 0], 1)],
    ids=["asymmetric", "asymmetric too", "not its own", "a weight", "not transitive"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(RuntimeError, match=r"mask.*SupConLoss.*labels"):
        SupConLoss()(features(2), mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": torch.zeros(3, 4)}, ValueError, r"features.*\(B, V, D\).*\(3, 4\)"),
        ({"features": None}, TypeError, "features.*NoneType"),
        ({"labels": torch.arange(5)}, ValueError, "labels.*6.*5"),
        ({"labels": [1]}, TypeError, "labels.*list"),
        ({"mask": torch.eye(5)}, ValueError, r"mask.*\(6, 6\).*\(5, 5\)"),
        ({"mask": torch.eye(6), "labels": torch.arange(6)}, ValueError, "labels, mask"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        SupConLoss()(**({"features": features(2)} | arguments))


def test_an_unknown_mode():
    with pytest.raises(ValueError, match=r"contrast_mode.*two"):
        SupConLoss(contrast_mode="two")
