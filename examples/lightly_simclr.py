"""SimCLR with lightly's transform, projection head and loss. One line replaces the loss by ours.

    python examples/lightly_simclr.py [--steps N]

Needs lightly and torchvision. The images are random blots of colour, so there is nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torchvision.transforms.functional import to_pil_image

import selfsup_kernels; selfsup_kernels.compat.patch("lightly")  # isort: skip  # fmt: skip  # noqa: E702


class Blots(torch.utils.data.Dataset):
    """Smooth random images of 40 x 40; an index always gives the same image."""

    def __init__(self, size, transform):
        self.size, self.transform = size, transform

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(index))
        image = F.interpolate(coarse, size=40, mode="bicubic").clamp(0, 1)[0]
        return self.transform(to_pil_image(image)), index


def convnet(widths=(32, 64, 128, 256)):
    """Return a few convolutions that halve the image, followed by an average over its positions."""
    stages = [
        nn.Sequential(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for before, width in zip((3, *widths[:-1]), widths, strict=True)
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1))


class SimCLR(nn.Module):
    def __init__(self, backbone, dim):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(dim, dim, 128)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    model = SimCLR(convnet(), 256).to(dtype)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, min_scale=0.5, random_gray_scale=0.0, gaussian_blur=0.0)
    dataset = Blots(args.steps * args.batch, transform)
    loader = torch.utils.data.DataLoader(dataset, args.batch, shuffle=True, drop_last=True)
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    for step, ((x0, x1), _) in enumerate(loader):
        loss = criterion(model(x0.to(dtype)), model(x1.to(dtype)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.9f}")


if __name__ == "__main__":
    main()
