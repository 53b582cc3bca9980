"""A batch whose activations would not fit: SimCLR's loss over 1024 digits, encoded 64 at a time.

    python examples/chunked.py [--steps N] [--batch B] [--chunk C]

This encoder has no BatchNorm, which would see chunks instead of the batch.
"""

import argparse

import torch
from digits import DIM, WIDTH, endless, knn_accuracy, load, loader, report
from torch import nn

import selfsup_kernels as sk


def encoder():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, WIDTH))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.SimCLR(encoder(), nn.Linear(WIDTH, DIM), temperature=0.5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    batches = endless(loader(load()[0], options.batch))
    losses = []
    for step in range(options.steps):
        optimizer.zero_grad()
        # In place of method(views).backward(); the gradients are the same.
        loss = sk.chunked_backward(method.embed, next(batches), method.loss, options.chunk)
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1])
    print(f"k-NN accuracy {knn_accuracy(method.encoder):.3f}")
    return losses


if __name__ == "__main__":
    main()
