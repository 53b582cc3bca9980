"""compat.solo against solo-learn 1.0.2, the last version on the registry. Of 1.0.6, which has other signatures, the
formulas stand in ``tests/test_compat_solo.py``."""

import importlib.util
from pathlib import Path

import pytest
import torch
from interop.helpers import assert_same, views

from selfsup_kernels.compat import solo as ours


def load(name):
    """One file of the package, whose own __init__ imports far more than is installed here."""
    folder = Path(importlib.util.find_spec("solo").origin).parent
    spec = importlib.util.spec_from_file_location(f"solo_{name}", folder / "losses" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr(temperature):
    original = load("simclr").simclr_loss_func
    z1, z2 = views(64, 32)
    assert_same(
        lambda a, b: ours.simclr_loss_func(a, b, temperature), lambda a, b: original(a, b, temperature), [z1, z2]
    )
    # With one positive a row, version 1.0.6 is the same loss of rows and indexes.
    indexes = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_same(
        lambda a, b: ours.simclr_loss_func(torch.cat([a, b]), indexes.repeat(2), temperature),
        lambda a, b: original(a, b, temperature),
        [z1, z2],
    )


@pytest.mark.parametrize("simplified", [True, False])
def test_byol(simplified):
    original = load("byol").byol_loss_func
    assert_same(
        lambda p, z: ours.byol_loss_func(p, z, simplified), lambda p, z: original(p, z, simplified), views(64, 32)
    )
