"""MoCo on handwritten digits, as a plain loop.

python examples/moco.py [--steps N] [--queue K]
"""

import argparse

import torch
from digits import encoder, endless, head, knn_accuracy, load, loader, report

import selfsup_kernels as sk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queue", type=int, default=1000, help="any size: batches of 256 need not divide it")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.MoCo(encoder(), head(), options.queue, momentum=0.99, temperature=0.2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    batches = endless(loader(load()[0]))
    losses = []
    for step in range(options.steps):
        query_view, key_view = next(batches)
        loss = method(query_view, key_view)  # the keys are in the queue after this
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update_target()
        losses.append(loss.item())
        report(step, losses[-1])
    print(f"k-NN accuracy {knn_accuracy(method.encoder):.3f}")
    return losses


if __name__ == "__main__":
    main()
