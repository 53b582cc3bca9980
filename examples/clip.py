"""CLIP on handwritten digits, as a plain loop: two towers, a learnable scale, and all processes' negatives.

The left and the right half of an image are a pair.

python examples/clip.py [--steps N] [--amp]
torchrun --nproc-per-node 2 examples/clip.py [--steps N] [--amp]
"""

import argparse
import os

import torch
import torch.distributed as dist
from digits import endless, half_tower, load, loader, report, report_retrieval
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import selfsup_kernels as sk


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_tower, self.text_tower = half_tower(), half_tower()
        # open_clip's: logit_scale starts at log(1 / 0.07) and is clamped at log(100).
        self.loss = sk.InfoNCELoss(
            0.07, objective="cross_view", learnable_temperature=True, max_scale=100, group="world"
        )

    def forward(self, image, text):
        return self.loss(self.image_tower(image), self.text_tower(text))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = method = Clip()
    rank, ranks = 0, 1
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(method, broadcast_buffers=False)
    scale = {"params": method.loss.parameters(), "weight_decay": 0.0}
    towers = [*method.image_tower.parameters(), *method.text_tower.parameters()]
    optimizer = torch.optim.AdamW([{"params": towers}, scale], lr=1e-3)
    train, _, test, _ = load()
    batches = endless(loader(train[rank::ranks], num_views=1, view=lambda images: images))
    losses = []
    for step in range(options.steps):
        (images,) = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.amp):
            loss = model(*images.split(4, dim=3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if rank == 0:
            report(step, losses[-1])
    method.eval()
    if rank == 0:
        report_retrieval(method.image_tower, method.text_tower, test)
    if ranks > 1:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
