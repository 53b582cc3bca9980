"""SigLIP on handwritten digits, as a plain loop: the left and the right half of an image are a pair.

python examples/siglip.py [--steps N]
"""

import argparse

import torch
from digits import endless, half_tower, load, loader, report, report_retrieval

import selfsup_kernels as sk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    method = sk.methods.SigLIP(half_tower(), half_tower())
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
    method.eval()
    report_retrieval(method.embed_image, method.embed_text, test)
    return losses


if __name__ == "__main__":
    main()
