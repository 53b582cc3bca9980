"""SigLIP on handwritten digits, as a plain loop: the left and the right half of an image are a pair.

python examples/siglip.py [--steps N]
"""

import argparse

import torch
import torch.nn.functional as F
from digits import endless, head, load, loader, report
from torch import nn

import selfsup_kernels as sk


def tower():
    """Return a network from ``(B, 1, 8, 4)`` to ``(B, 64)``."""
    convolution = nn.Conv2d(1, 32, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), head(32 * 32))


@torch.no_grad()
def retrieval(method, left, right):
    """Return how often the own right half is the nearest to a left half, and the reverse."""
    method.eval()
    x = F.normalize(method.embed_image(left), dim=-1)
    y = F.normalize(method.embed_text(right), dim=-1)
    scores, own = x @ y.T, torch.arange(len(x))
    return [(s.argmax(1) == own).float().mean().item() for s in (scores, scores.T)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.SigLIP(tower(), tower())
    towers = [*method.image_tower.parameters(), *method.text_tower.parameters()]
    scalars = {"params": method.loss.parameters(), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": towers}, scalars], lr=1e-3)
    train, _, test, _ = load()
    batches = endless(loader(train, num_views=1, view=lambda images: images))
    losses = []
    for step in range(options.steps):
        (images,) = next(batches)
        loss = method(*images.split(4, dim=3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1])
    to_right, to_left = retrieval(method, *test.split(4, dim=3))
    print(f"top-1 of {len(test)} held-out pairs: {to_right:.3f} left to right, {to_left:.3f} right to left,", end=" ")
    print(f"chance {1 / len(test):.3f}")
    return losses


if __name__ == "__main__":
    main()
