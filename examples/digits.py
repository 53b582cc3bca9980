"""Shared by the examples: scikit-learn's handwritten digits, views of them, small networks, and a k-NN score."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

WIDTH, DIM = 128, 64


def load():
    """Return (training images, labels, test images, labels): 1797 images ``(1, 8, 8)`` in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return images[train], labels[train], images[test], labels[test]


def augment(images):
    """Return a random view of each image: rotated, sheared, shifted and scaled, with random contrast and noise."""
    n = len(images)
    theta = torch.eye(2, 3).repeat(n, 1, 1) + 0.25 * torch.randn(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.08 * torch.randn_like(moved)


def loader(images, batch=256, num_views=2, view=augment):
    """Return batches of ``num_views`` views, shuffled in every epoch."""

    def views(items):
        chosen = images[torch.stack(items)]
        return [view(chosen) for _ in range(num_views)]

    indices = torch.arange(len(images))
    return torch.utils.data.DataLoader(indices, batch, shuffle=True, drop_last=True, collate_fn=views)


def endless(batches):
    while True:
        yield from batches


def encoder(channels=1):
    """Return a network from ``(B, channels, 8, 8)`` to ``(B, WIDTH)``."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, WIDTH),
    )


def head(inside=WIDTH, outside=DIM):
    """Return a projector or predictor: an MLP with one hidden layer."""
    return nn.Sequential(nn.Linear(inside, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, outside))


def half_tower():
    """Return a network from the half of an image ``(B, 1, 8, 4)`` to ``(B, DIM)``."""
    convolution = nn.Conv2d(1, 32, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), head(32 * 32))


@torch.no_grad()
def knn_accuracy(network, k=5):
    """Return the test accuracy of a vote of the ``k`` nearest training images by cosine."""
    training = network.training
    network.eval()
    x, y, x_test, y_test = load()
    z, z_test = (F.normalize(network(images).flatten(1), dim=-1) for images in (x, x_test))
    network.train(training)
    votes = y[(z_test @ z.T).topk(k).indices]
    return (votes.mode(dim=1).values == y_test).float().mean().item()


@torch.no_grad()
def report_retrieval(embed_left, embed_right, images):
    """Print how often the own right half is the nearest to a left half, and the reverse."""
    left, right = images.split(4, dim=3)
    x, y = (F.normalize(embed(half), dim=-1) for embed, half in ((embed_left, left), (embed_right, right)))
    scores, own = x @ y.T, torch.arange(len(x))
    to_right, to_left = ((s.argmax(1) == own).float().mean().item() for s in (scores, scores.T))
    print(f"top-1 of {len(x)} held-out pairs: {to_right:.3f} left to right, {to_left:.3f} right to left,", end=" ")
    print(f"chance {1 / len(x):.3f}")


def report(step, loss, every=20):
    if step % every == 0:
        print(f"step {step:4d}  loss {loss:.4f}")
