"""The handwritten digits that scikit-learn ships, split once, and the augmentations that make the views."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Digits:
    """Images ``(n, 1, 8, 8)`` in [0, 1] and labels; the labels serve the evaluation only."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_digits(test_share=0.3) -> Digits:
    """1797 real images of 8 x 8, in a stratified split that does not depend on the demo's seed."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    images = (images / 16.0).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=test_share, stratify=labels, random_state=0)
    return Digits(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y),
        torch.tensor(x_test, dtype=torch.float32),
        torch.tensor(y_test),
    )


def warp(images, generator, *, degrees=25.0, shift=1.25, scale=0.2, shear=0.25):
    """Every image rotated, moved, scaled and sheared by its own random amount, in one ``grid_sample``.

    ``shift`` is in pixels; the other amounts are uniform in plus or minus what is given.
    """
    n, _, height, width = images.shape

    def uniform(amount, *shape):
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * amount

    angle = uniform(math.radians(degrees))
    zoom = 1 + uniform(scale)
    slant = uniform(shear)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos, -sin + slant
    theta[:, 1, 0], theta[:, 1, 1] = sin, cos
    # grid_sample's coordinates run over [-1, 1], so a pixel is 2 / width.
    theta[:, :, 2] = uniform(shift, 2) * torch.tensor([2 / width, 2 / height])
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def augment(images, generator, *, noise=0.08, contrast=0.4, occlude=0.5, patch=3):
    """One random view of each image: warp, contrast, a hidden square in some, noise."""
    n, _, height, width = images.shape
    x = warp(images, generator)
    x = x * (1 + (torch.rand(n, 1, 1, 1, generator=generator) * 2 - 1) * contrast)
    top = torch.randint(0, height - patch + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(0, width - patch + 1, (n, 1, 1, 1), generator=generator)
    rows, columns = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    hidden = (rows >= top) & (rows < top + patch) & (columns >= left) & (columns < left + patch)
    hidden &= torch.rand(n, 1, 1, 1, generator=generator) < occlude
    x = x.masked_fill(hidden, 0.0)
    return x + noise * torch.randn(x.shape, generator=generator)


def batches(images, batch_size, num_views, steps, seed):
    """``steps`` batches of ``num_views`` augmented views each, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = images[order[:batch_size]], order[batch_size:]
        yield [augment(chosen, generator) for _ in range(num_views)]
