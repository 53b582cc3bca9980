"""Define each measured workload once: its inputs, our call, and the operations and bytes that it needs.

    made = case("info_nce", views=2, batch=1024, dim=128, dtype="float32")
    inputs = made.inputs("cpu", seed=0)
    made.run("both", made.ours("auto"), inputs)

This file needs only the public functions of the package, so that it can measure another version of it: as a script it
reads a list of (parameters of a case, part) from its input, and prints what they take with the package that it finds.
"""

import json
import sys
from dataclasses import dataclass, fields, replace
from math import prod

import torch

import selfsup_kernels as sk

TEMPERATURE = 0.1
SCALE, BIAS = 10.0, -10.0
MOMENTUM = 0.996
PARTS = ("forward", "backward", "both")

DTYPES = {name: name for name in ("float32", "float64", "bfloat16", "float16")}
DTYPES |= {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def case(op, **parameters):
    """Return the workload of ``info_nce``, ``siglip``, ``byol`` or ``ema``; raise KeyError for another name."""
    return CASES[op](**parameters)


def case_of(row):
    """Return the workload that a row of results was measured on."""
    return case(row["op"], **{f.name: row[f.name] for f in fields(CASES[row["op"]]) if f.name in row})


def item_size(dtype):
    return getattr(torch, dtype).itemsize


def randn(shape, dtype, device, generator):
    return torch.randn(shape, device=device, generator=generator).to(getattr(torch, dtype))


class Workload:
    """Share how every workload runs a function of its inputs.

    ``forward`` and ``update`` run without autograd, as an evaluation does; ``backward`` needs the graph of a forward,
    which ``prepare`` makes and which is not timed.
    """

    def prepare(self, part, function, inputs):
        """Return what ``work`` takes."""
        for x in inputs if part != "update" else ():
            x.grad = None
        return function(*inputs) if part == "backward" else inputs

    def work(self, part, function, prepared):
        """Do what is timed."""
        if part == "backward":
            return prepared.backward()
        if part == "both":
            return function(*prepared).backward()
        with torch.no_grad():
            return function(*prepared)

    def run(self, part, function, inputs):
        return self.work(part, function, self.prepare(part, function, inputs))


@dataclass(frozen=True)
class Loss(Workload):
    """Share what the losses have."""

    batch: int = 1024
    dim: int = 128
    views: int = 2
    dtype: str = "float32"
    parts = PARTS

    @property
    def facts(self):
        """Return the columns of a row of results that say what was measured."""
        return {"op": self.op} | {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def label(self):
        objective = getattr(self, "objective", "supcon_out")
        other = "" if objective == "supcon_out" else f" {objective}"
        return f"{self.op}{other} V{self.views} B{self.batch} D{self.dim} {self.dtype}"

    def small(self):
        """Return the same with few numbers, to load libraries and start threads before a measurement."""
        return replace(self, batch=16)

    def bytes(self, part):
        """Return what has to move: inputs read in each pass, the gradient written."""
        forward = self.tensors_read
        passes = {"forward": forward, "backward": forward + 1, "both": 2 * forward + 1}[part]
        return passes * self.views * self.batch * self.dim * item_size(self.dtype)


@dataclass(frozen=True)
class InfoNCE(Loss):
    """Hold an objective of ``(V, B, D)`` views: M = V B rows, similarities of all with all."""

    objective: str = "supcon_out"
    op = "info_nce"
    tensors_read = 1

    @property
    def rows(self):
        return self.views * self.batch

    def inputs(self, device="cpu", seed=0):
        shape = (self.views, self.batch, self.dim)
        return (randn(shape, self.dtype, device, torch.Generator(device).manual_seed(seed)).requires_grad_(),)

    def ours(self, impl="auto"):
        return lambda views: sk.info_nce_loss(views, temperature=TEMPERATURE, objective=self.objective, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Return the floating-point operations of our kernels' matrix products.

        In units of M^2 D: both forwards take half of the symmetric matrix of similarities. The CPU's backward
        recomputes that half and adds each tile to both of its sides; the GPU's recomputes all of it. ``cross_view``
        leaves out the similarities within a view.
        """
        backward = 3 if scheme == "cpu" else 4
        scores = self.rows * (self.rows - self.batch * (self.objective == "cross_view"))
        return {"forward": 1, "backward": backward, "both": 1 + backward}[part] * scores * self.dim


@dataclass(frozen=True)
class BYOL(Loss):
    """Hold the BYOL loss: all pairs of different views of ``(V, B, D)``, or with ``views=1`` of ``(B, D)`` pairs."""

    dim: int = 256
    op = "byol"
    tensors_read = 2

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.views, self.batch, self.dim) if self.views > 1 else (self.batch, self.dim)
        predictions, targets = (randn(shape, self.dtype, device, generator) for _ in range(2))
        return predictions.requires_grad_(), targets

    def ours(self, impl="auto"):
        return lambda predictions, targets: sk.byol_loss(predictions, targets, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Return the operations of three products for each pair forward, of two scaled rows and their sum backward."""
        pairs = max(1, self.views * (self.views - 1)) * self.batch * self.dim
        return {"forward": 6, "backward": 3, "both": 9}[part] * pairs


@dataclass(frozen=True)
class SigLIP(Loss):
    """Hold the sigmoid loss of two ``(B, D)`` matrices: similarities of all of one with all of the other.

    There is no part "backward": our forward makes the gradient.
    """

    op = "siglip"
    parts = ("forward", "both")
    tensors_read = 1

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        x, y = (randn((self.batch, self.dim), self.dtype, device, generator).requires_grad_() for _ in range(2))
        scalars = (torch.tensor(value, device=device, requires_grad=True) for value in (SCALE, BIAS))
        return x, y, *scalars

    def ours(self, impl="auto"):
        return lambda x, y, scale, bias: sk.siglip_loss(x, y, scale=scale, bias=bias, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Return the operations of the scores, and of the products for the gradients of both sides."""
        return {"forward": 2, "both": 6}[part] * self.batch**2 * self.dim


@dataclass(frozen=True)
class EMA(Workload):
    """Hold the moving average of a model's parameters: float32 targets, sources of ``dtype``."""

    model: str = "ResNet-50"
    dtype: str = "float32"
    op = "ema"
    parts = ("update",)

    @property
    def shapes(self):
        return MODELS[self.model]()

    @property
    def numbers(self):
        return sum(map(prod, self.shapes))

    @property
    def facts(self):
        facts = {"op": self.op, "model": self.model, "tensors": len(self.shapes), "numbers": self.numbers}
        return facts | {"target": "float32", "source": self.dtype, "dtype": self.dtype}

    @property
    def label(self):
        return f"{self.op} {self.model} float32 <- {self.dtype}"

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        return tuple([randn(s, d, device, generator) for s in self.shapes] for d in ("float32", self.dtype))

    def ours(self, impl="auto"):
        return lambda targets, sources: sk.ema_update_(targets, sources, MOMENTUM, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Return a difference, a product and a sum for each number."""
        return 3 * self.numbers

    def bytes(self, part):
        """Return what has to move: each target read and written, each source read."""
        return (8 + item_size(self.dtype)) * self.numbers

    def small(self):
        return EMA("tiny", self.dtype)


CASES = {kind.op: kind for kind in (InfoNCE, SigLIP, BYOL, EMA)}


def resnet50_shapes():
    """Return the 161 parameter shapes of ResNet-50: 25.6 M numbers."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    wide_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        wide = 4 * width
        for block in range(blocks):
            convolutions = [(width, wide_in, 1, 1), (width, width, 3, 3), (wide, width, 1, 1)]
            convolutions += [] if block else [(wide, wide_in, 1, 1)]
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            wide_in = wide
    return [*shapes, (1000, 2048), (1000,)]


def vit_b_shapes():
    """Return the 152 parameter shapes of ViT-B/16: 86.6 M numbers."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *(12 * block), (d,), (d,), (1000, d), (1000,)]


def tiny_shapes():
    """Return a few small shapes, to see that something works."""
    return [(32, 16, 3, 3), (32,), (32,), (10, 32), (10,)]


MODELS = {"ResNet-50": resnet50_shapes, "ViT-B": vit_b_shapes, "tiny": tiny_shapes}


def main(device, seconds):
    from torch.utils.benchmark import Timer

    rows = []
    for parameters, part in json.load(sys.stdin):
        try:
            made = case(**parameters)
            names = {"run": made.run, "part": part, "ours": made.ours("auto"), "inputs": made.inputs(device)}
            timer = Timer("run(part, ours, inputs)", globals=names, num_threads=torch.get_num_threads())
            timer.timeit(3)
            rows.append(1e3 * timer.blocked_autorange(min_run_time=float(seconds)).median)
        except Exception as error:  # an older package may refuse what this one can do
            rows.append(f"{type(error).__name__}: {error}")
    impl = sk.backends.select("auto", torch.empty(0, device=device))
    print(json.dumps({"package": sk.__file__, "impl": impl, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[2:])
