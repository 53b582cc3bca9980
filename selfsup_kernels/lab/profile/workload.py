"""Train what the command profiles: a method of the package on synthetic images, with our losses or eager ones.

:func:`profiled` and :func:`grown` are called in fresh processes, with a :class:`Workload` as a dictionary.
"""

import contextlib
import copy
import importlib
import itertools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import eager
from selfsup_kernels.lab.profile import memory

VARIANTS = ("ours", "eager")
METHODS = {
    "simclr": lambda work, networks, predictor: sk.methods.SimCLR(*networks, 0.5),
    "cmc": lambda work, networks, predictor: sk.methods.CMC(*networks, 0.07),
    "clip": lambda work, networks, predictor: sk.methods.CMC(
        *twice(networks), 0.07, learnable_temperature=True, max_scale=100
    ),
    "siglip": lambda work, networks, predictor: sk.methods.SigLIP(
        *(nn.Sequential(*tower) for tower in zip(*twice(networks), strict=True))
    ),
    "moco": lambda work, networks, predictor: sk.methods.MoCo(
        *networks, QUEUE, temperature=0.2, symmetric=work.views > 2, dim=work.dim
    ),
    "byol": lambda work, networks, predictor: sk.methods.BYOL(*networks, predictor),
    "byol_contrast": lambda work, networks, predictor: sk.methods.BYOLContrast(*networks, predictor, temperature=0.1),
}
TWO_TOWERS = ("clip", "siglip")
"""Methods with an encoder and a projector for each of two views; the others share one."""
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUEUE = 65536
POOL = 512
"""Different images; a batch draws from them."""


class Workload(NamedTuple):
    method: str = "simclr"
    variant: str = "ours"
    encoder: str = "convnet"
    batch: int = 256
    views: int = 2
    image_size: int = 16
    dim: int = 128
    accumulate: int = 1
    amp: str | None = None
    compile: bool = False
    device: str = "cpu"


def convolutions(inputs, *layers) -> list[nn.Module]:
    """Make a convolution with BatchNorm and ReLU for each of ``layers``, ``(outputs, stride)``."""
    made = []
    for outputs, stride in layers:
        made += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        inputs = outputs
    return made


def convnet() -> nn.Sequential:
    """Make the default encoder: four convolutions for small images with three channels."""
    layers = convolutions(3, (16, 2), (32, 1), (64, 2), (128, 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def head(inputs, hidden, outputs) -> nn.Sequential:
    """Make a projector or a predictor."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


def make_encoder(name) -> nn.Module:
    """Make ``convnet``, what ``module:callable`` returns, or what timm calls ``name``."""
    if name == "convnet":
        return convnet()
    if ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)()
    import timm

    return timm.create_model(name, num_classes=0)


@torch.no_grad()
def width(encoder, image_size) -> int:
    """Return how many numbers the encoder makes of one image."""
    rows = encoder.eval()(torch.zeros(2, 3, image_size, image_size))
    encoder.train()
    if rows.dim() != 2 or len(rows) != 2:
        raise ValueError(f"it returned {tuple(rows.shape)}")
    return rows.shape[1]


def twice(networks):
    """Return a pair of each network, with parameters of its own."""
    return [[network, copy.deepcopy(network)] for network in networks]


def called(method):
    """Yield the networks of a method that are called as a whole."""
    for name in ("encoder", "projector", "predictor", "image_tower", "text_tower"):
        network = getattr(method, name, None)
        if network is not None:
            yield from network if isinstance(network, nn.ModuleList) else [network]
    if hasattr(method, "target"):
        yield method.target.module


def build(work):
    """Make the method, on its device."""
    torch.manual_seed(0)
    encoder = make_encoder(work.encoder)
    networks = encoder, head(width(encoder, work.image_size), 2 * work.dim, work.dim)
    method = METHODS[work.method](work, networks, head(work.dim, 2 * work.dim, work.dim))
    if work.variant == "eager":
        make_eager(method)
    method.to(work.device)
    if work.compile:  # in place, so that moving averages and their names stay
        for network in called(method):
            network.compile()
    return method


def make_eager(method) -> None:
    """Replace the package's losses and moving average by what one writes in PyTorch without it."""
    if isinstance(method, sk.methods.MoCo):
        method.contrast = eager_contrast(method)
    elif isinstance(method, sk.methods.BYOL):
        method.loss = eager.BYOLLoss()
        if isinstance(method, sk.methods.BYOLContrast):
            method.contrast = eager.CrossViewLoss(method.contrast.temperature)
    elif isinstance(method, sk.methods.SigLIP):
        method.loss = eager.SigLIPLoss(method.loss.scale.item(), method.loss.bias.item())
    elif isinstance(method, sk.methods.CMC):
        learnable, temperature = method.loss.logit_scale is not None, method.loss.temperature
        method.loss = eager.CrossViewLoss(temperature.item() if learnable else temperature, learnable)
    else:
        method.loss = eager.InfoNCELoss(method.loss.temperature)
    target = getattr(method, "target", None)
    if target is not None:
        target.update = lambda momentum=None: eager.ema_update_(
            target.module, method.online, target.momentum if momentum is None else momentum
        )


def eager_contrast(method):
    """Return MoCo's loss as its authors write it: the positive's score before the queue's, and cross-entropy."""

    def contrast(queries, keys):
        negatives = method.queue.clone().T  # the queue is overwritten before the backward reads it
        rest, terms = [query @ negatives for query in queries], []
        for (u, query), (v, key) in itertools.product(enumerate(queries), enumerate(keys)):
            if u != v or not method.symmetric:
                scores = torch.cat([(query * key).sum(-1, keepdim=True), rest[u]], 1) / method.temperature
                first = torch.zeros(len(query), dtype=torch.int64, device=query.device)
                terms.append(F.cross_entropy(scores, first))
        return torch.stack(terms).mean()

    return contrast


def loader(work, count):
    """Yield views for ``count`` steps: random images, half of them flipped, changed in contrast."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(POOL, 3, work.image_size, work.image_size, generator=generator)
    images = torch.cat([images, images.flip(-1)])
    size = work.batch // work.accumulate
    for _ in range(count * work.accumulate):
        chosen = torch.randint(0, POOL, (size,), generator=generator)
        flips = torch.randint(0, 2, (work.views, size), generator=generator)
        contrasts = 0.6 + 0.8 * torch.rand(work.views, size, 1, 1, 1, generator=generator)
        yield [images[chosen + POOL * f].mul_(c) for f, c in zip(flips, contrasts, strict=True)]


class Trainer:
    """Hold the body of a user's training loop."""

    def __init__(self, work):
        self.work, self.method = work, build(work)
        self.optimizer = torch.optim.AdamW([p for p in self.method.parameters() if p.requires_grad], 1e-3)
        kind = torch.device(work.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=work.amp == "fp16")
        self.autocast = torch.autocast(kind, AMP[work.amp]) if work.amp else contextlib.nullcontext()
        self.batches = 0

    def batch(self, views):
        """Train on one batch; after the last of ``accumulate`` follow the optimizer's step and the target's."""
        work = self.work
        with self.autocast:
            value = self.method(*(view.to(work.device) for view in views))
        self.scaler.scale(value / work.accumulate).backward()
        self.batches += 1
        if self.batches % work.accumulate == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if hasattr(self.method, "update_target"):
                self.method.update_target()


def claim(device, limit=None):
    """Make a GPU the current one, with no more than ``limit`` bytes for this process's tensors; nothing on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(0 if device.index is None else device)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))


def profiled(work, steps, out) -> dict:
    """Profile ``steps`` steps with marks and as many without, and write a trace into ``out``; return the summary."""
    work = Workload(**work)
    claim(work.device)
    trainer = Trainer(work)
    with sk.profile.steps(trainer.method, device=work.device) as run:
        for views in run(loader(work, 2 + 2 * steps + 2), accumulate=work.accumulate):
            trainer.batch(views)
    return run.save_trace(out)


def grown(work, limit=None, steps=3) -> dict:
    """Measure this process's peak memory over a few steps, and the seconds of one.

    ``limit``: bytes of a GPU that it may take; on a CPU the process has its limit from outside.
    """
    work = Workload(**work)
    claim(work.device, limit)
    trainer = Trainer(work)
    for i, views in enumerate(loader(work, steps)):
        if i == work.accumulate:  # the first step only warms up
            begin = time.perf_counter()
        trainer.batch(views)
    peak = memory.process_peak(work.device)
    if work.device != "cpu":
        torch.cuda.synchronize()
    return {"batch": work.batch, "peak_bytes": peak, "seconds": (time.perf_counter() - begin) / (steps - 1)}
