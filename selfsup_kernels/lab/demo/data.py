"""Load the handwritten digits that scikit-learn ships, split once, and augment them into views."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Digits(NamedTuple):
    """Images ``(n, 1, 8, 8)`` in [0, 1] and labels; the labels serve the evaluation only."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> Digits:
    """Return 1797 real images of 8 x 8, in a stratified split that does not depend on the demo's seed."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    images = (images / 16.0).reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(torch.tensor, split)
    return Digits(train.float(), train_labels, test.float(), test_labels)


def augment(images, generator):
    """Return one view of each image: rotated, moved, scaled, sheared, its contrast changed, part hidden, noise."""
    n, _, height, width = images.shape

    def uniform(amount, *shape):
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * amount

    angle, zoom, slant = uniform(math.radians(25.0)), 1 + uniform(0.2), uniform(0.25)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # grid_sample's coordinates run over [-1, 1], so a pixel is 2 / width.
    shift = uniform(1.25, 2) * torch.tensor([2 / width, 2 / height])
    theta = torch.cat([torch.stack([cos, slant - sin, sin, cos], 1).view(n, 2, 2), shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(images, grid, align_corners=False) * (1 + uniform(0.4, 1, 1, 1))

    patch = 3
    top = torch.randint(0, height - patch + 1, (n, 1, 1, 1), generator=generator)
    left = torch.randint(0, width - patch + 1, (n, 1, 1, 1), generator=generator)
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    hidden = (rows >= top) & (rows < top + patch) & (columns >= left) & (columns < left + patch)
    hidden &= torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return x.masked_fill(hidden, 0.0) + 0.08 * torch.randn(x.shape, generator=generator)


def batches(images, batch_size, num_views, steps, seed):
    """Yield ``steps`` batches of ``num_views`` augmented views each, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = images[order[:batch_size]], order[batch_size:]
        yield [augment(chosen, generator) for _ in range(num_views)]
