"""BYOL and N-view contrast together on handwritten digits, as a plain loop.

python examples/byol_contrast.py [--steps N] [--views V] [--byol-weight W] [--contrast-weight W]
"""

import argparse

import torch
from digits import DIM, encoder, endless, head, knn_accuracy, load, loader

import selfsup_kernels as sk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--byol-weight", type=float, default=1.0)
    parser.add_argument("--contrast-weight", type=float, default=0.5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.BYOLContrast(
        encoder(),
        head(),
        head(DIM),
        temperature=0.2,
        byol_weight=options.byol_weight,
        contrast_weight=options.contrast_weight,
    )
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    batches = endless(loader(load()[0], num_views=options.views))
    losses = []
    for step in range(options.steps):
        loss = method(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update_target(sk.cosine_momentum(step, options.steps, base=0.98))
        losses.append(loss.item())
        if step % 20 == 0:
            parts = "  ".join(f"{name} {part:.4f}" for name, part in method.parts.items())
            print(f"step {step:4d}  loss {losses[-1]:.4f}  {parts}")
    print(f"k-NN accuracy {knn_accuracy(method.encoder):.3f}")
    return losses


if __name__ == "__main__":
    main()
