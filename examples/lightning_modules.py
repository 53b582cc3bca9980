"""The methods as Lightning modules, and a Trainer that runs one of them on handwritten digits.

    python examples/lightning_modules.py {simclr,moco,byol,cmc,byol_contrast,chunked} [--steps N]

Needs Lightning. A method is a plain module; `Contrastive`, `WithTarget` and `Chunked` adapt methods to Lightning.
"""

import argparse

import lightning
import torch
from digits import DIM, WIDTH, encoder, head, knn_accuracy, load, loader
from torch import nn

import selfsup_kernels as sk


class Contrastive(lightning.LightningModule):
    """A method without a target: SimCLR, CMC. A batch is a list of views.

    To use the negatives of all processes, build the method with ``group="world"``.
    """

    def __init__(self, method, lr=1e-3):
        super().__init__()
        self.method, self.lr = method, lr

    def training_step(self, views, batch_idx):
        loss = self.method(views)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.method.parameters() if p.requires_grad], lr=self.lr)


class WithTarget(Contrastive):
    """A method with a target network: BYOL, MoCo, BYOLContrast.

    `optimizer_step` updates the target after each step of the optimizer (not after every batch of an accumulated
    gradient), and before Lightning's callbacks save a checkpoint; the module's `on_train_batch_end` runs after them.
    Queue and target are in the module's state dict, so a checkpoint holds them.
    """

    def __init__(self, method, lr=1e-3, momentum=None):
        super().__init__(method, lr)
        self.momentum = momentum  # the start of BYOL's cosine schedule; None for the method's constant momentum

    def optimizer_step(self, *arguments, **named):
        super().optimizer_step(*arguments, **named)
        momentum = self.momentum
        if momentum is not None:
            steps = self.trainer.estimated_stepping_batches
            momentum = sk.cosine_momentum(self.trainer.global_step, steps, base=momentum)
        self.method.update_target(momentum)


class BYOLContrast(WithTarget):
    """BYOLContrast, with both parts of the loss logged."""

    def training_step(self, views, batch_idx):
        loss = super().training_step(views, batch_idx)
        self.log_dict(self.method.parts)
        return loss


class Chunked(Contrastive):
    """SimCLR on batches whose activations do not fit: manual optimization, since gradients come chunk by chunk.

    `manual_backward` lets Lightning scale the loss if its precision plugin does so.
    """

    def __init__(self, method, lr=1e-3, chunk_size=64):
        super().__init__(method, lr)
        self.automatic_optimization = False
        self.chunk_size = chunk_size

    def training_step(self, views, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        method = self.method
        loss = sk.chunked_backward(method.embed, views, method.loss, self.chunk_size, backward=self.manual_backward)
        optimizer.step()
        self.log("loss", loss, prog_bar=True)


def build(name):
    """Return the module of that name, with small networks for digits."""
    methods = sk.methods
    if name == "simclr":
        return Contrastive(methods.SimCLR(encoder(), head()))
    if name == "moco":
        return WithTarget(methods.MoCo(encoder(), head(), 1000, momentum=0.99, temperature=0.2))
    if name == "byol":
        return WithTarget(methods.BYOL(encoder(), head(), head(DIM)), momentum=0.98)
    if name == "cmc":
        return Contrastive(methods.CMC([encoder(), encoder()], head(), temperature=0.2))
    if name == "byol_contrast":
        return BYOLContrast(methods.BYOLContrast(encoder(), head(), head(DIM), temperature=0.2), momentum=0.98)
    # BatchNorm would see chunks instead of the batch.
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, WIDTH))
    return Chunked(methods.SimCLR(flat, nn.Linear(WIDTH, DIM)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["simclr", "moco", "byol", "cmc", "byol_contrast", "chunked"])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    module = build(options.method)
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, loader(load()[0]))
    network = module.method.encoder
    print(f"k-NN accuracy {knn_accuracy(network[0] if isinstance(network, nn.ModuleList) else network):.3f}")


if __name__ == "__main__":
    main()
