"""CMC on handwritten digits, as a plain loop: an image and its edges are two views with an encoder each.

python examples/cmc.py [--steps N]
"""

import argparse

import torch
from digits import augment, encoder, endless, head, knn_accuracy, load, loader, report

import selfsup_kernels as sk


def edges(images):
    """Return the horizontal and vertical differences, ``(B, 2, 8, 8)``."""
    across = torch.diff(images, dim=3, prepend=images[..., :1])
    down = torch.diff(images, dim=2, prepend=images[..., :1, :])
    return torch.cat([across, down], dim=1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.CMC([encoder(1), encoder(2)], [head(), head()], temperature=0.2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    batches = endless(loader(load()[0], view=augment))
    losses = []
    for step in range(options.steps):
        first, second = next(batches)
        loss = method(first, edges(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1])
    print(f"k-NN accuracy {knn_accuracy(method.encoder[0]):.3f} of images,", end=" ")
    print(f"{knn_accuracy(torch.nn.Sequential(Edges(), method.encoder[1])):.3f} of edges")
    return losses


class Edges(torch.nn.Module):
    def forward(self, images):
        return edges(images)


if __name__ == "__main__":
    main()
