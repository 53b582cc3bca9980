"""SimCLR on handwritten digits, as a plain loop.

python examples/simclr.py [--steps N] [--views V]
"""

import argparse

import torch
from digits import encoder, endless, head, knn_accuracy, load, loader, report

import selfsup_kernels as sk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--views", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.SimCLR(encoder(), head(), temperature=0.5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    batches = endless(loader(load()[0], num_views=options.views))
    losses = []
    for step in range(options.steps):
        loss = method(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(step, losses[-1])
    print(f"k-NN accuracy {knn_accuracy(method.encoder):.3f}")
    return losses


if __name__ == "__main__":
    main()
