"""The one definition of each measured workload: its inputs, our call, and what has to be computed and moved.

    made = case("info_nce", views=2, batch=1024, dim=128, dtype="float32")
    inputs = made.inputs("cpu", seed=0)
    made.run("both", made.ours("auto"), inputs)

Nothing here needs more than the public functions of the package, so that the file can measure another version of it.
What others call for the same work is in ``rivals.py``.
"""

from dataclasses import dataclass, fields
from math import prod

import torch

import selfsup_kernels as sk

TEMPERATURE = 0.1
MOMENTUM = 0.996
PARTS = ("forward", "backward", "both")

DTYPES = {"float32": "float32", "float64": "float64", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""The name in results of every name that is understood."""


def case(op, **parameters):
    """The workload of one operation: ``info_nce``, ``byol`` or ``ema``. Raises KeyError for another name."""
    return CASES[op](**parameters)


def case_of(row):
    """The workload that a row of results was measured on."""
    kind = CASES[row["op"]]
    return kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row})


@dataclass(frozen=True)
class Loss:
    """What the losses share: ``run`` takes a function of the inputs that returns the loss.

    ``forward`` is without autograd, which is what evaluation costs; ``backward`` alone needs the graph of a forward,
    which :meth:`prepare` makes and nobody times.
    """

    batch: int = 1024
    dim: int = 128
    views: int = 2
    dtype: str = "float32"
    parts = PARTS

    def prepare(self, part, function, inputs):
        """What :meth:`work` takes; not part of what is timed."""
        for x in inputs:
            x.grad = None
        return function(*inputs) if part == "backward" else inputs

    def work(self, part, function, prepared):
        if part == "backward":
            return prepared.backward()
        if part == "both":
            return function(*prepared).backward()
        with torch.no_grad():
            return function(*prepared)

    def run(self, part, function, inputs):
        return self.work(part, function, self.prepare(part, function, inputs))

    @property
    def facts(self):
        """The columns of a row of results that say what was measured."""
        return {"op": self.op} | {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def item_size(self):
        return getattr(torch, self.dtype).itemsize

    @property
    def label(self):
        return f"{self.op} V{self.views} B{self.batch} D{self.dim} {self.dtype}"

    def small(self):
        """The same with few numbers, to load libraries and start threads before anything is measured."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self)} | {"batch": 16})


UNITS = {"cpu": {"forward": 1, "backward": 3}, "gpu": {"forward": 1, "backward": 4}}
"""Matrix products executed, in units of M^2 D operations: half of one product of M x D with D x M each.

Both forwards take half of the symmetric matrix of similarities. The CPU's backward recomputes that half and adds each
tile to both of its sides; the GPU's, where every program owns its rows, recomputes all of it."""


@dataclass(frozen=True)
class InfoNCE(Loss):
    """NT-Xent of ``(V, B, D)`` views: M = V B rows, similarities of all with all."""

    op = "info_nce"

    @property
    def rows(self):
        return self.views * self.batch

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.views, self.batch, self.dim)
        views = torch.randn(shape, device=device, generator=generator).to(getattr(torch, self.dtype))
        return (views.requires_grad_(),)

    def ours(self, impl="auto"):
        return lambda views: sk.info_nce_loss(views, temperature=TEMPERATURE, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Floating-point operations that our kernels execute in their matrix products."""
        units = UNITS[scheme]
        return (sum(units.values()) if part == "both" else units[part]) * self.rows**2 * self.dim

    def bytes(self, part):
        """What has to move: one read forward; a read and a write backward."""
        return {"forward": 1, "backward": 2, "both": 3}[part] * self.rows * self.dim * self.item_size


@dataclass(frozen=True)
class BYOL(Loss):
    """The BYOL loss: all pairs of different views of ``(V, B, D)``, or with ``views=1`` of ``(B, D)`` pairs."""

    dim: int = 256
    op = "byol"

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.views, self.batch, self.dim) if self.views > 1 else (self.batch, self.dim)
        p, t = (torch.randn(shape, device=device, generator=generator).to(getattr(torch, self.dtype)) for _ in range(2))
        return p.requires_grad_(), t

    def ours(self, impl="auto"):
        return lambda predictions, targets: sk.byol_loss(predictions, targets, impl=impl)

    def operations(self, part, scheme="cpu"):
        """Three products of rows for each pair forward; two scaled rows and their sum backward."""
        pairs = max(1, self.views * (self.views - 1)) * self.batch * self.dim
        return {"forward": 6, "backward": 3, "both": 9}[part] * pairs

    def bytes(self, part):
        """What has to move: two reads forward; two reads and a write backward."""
        numbers = self.views * self.batch * self.dim
        return {"forward": 2, "backward": 3, "both": 5}[part] * numbers * self.item_size


@dataclass(frozen=True)
class EMA:
    """The moving average of a model's parameters: float32 targets, sources of ``dtype``."""

    model: str = "ResNet-50"
    dtype: str = "float32"
    op = "ema"
    parts = ("update",)

    @property
    def shapes(self):
        return MODELS[self.model]()

    @property
    def numbers(self):
        return sum(prod(shape) for shape in self.shapes)

    @property
    def facts(self):
        facts = {"op": self.op, "model": self.model, "tensors": len(self.shapes), "numbers": self.numbers}
        return facts | {"target": "float32", "source": self.dtype, "dtype": self.dtype}

    @property
    def label(self):
        return f"{self.op} {self.model} float32 <- {self.dtype}"

    def inputs(self, device="cpu", seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        targets, sources = ([torch.randn(s, device=device, generator=generator) for s in self.shapes] for _ in range(2))
        return targets, [x.to(getattr(torch, self.dtype)) for x in sources]

    def ours(self, impl="auto"):
        return lambda targets, sources: sk.ema_update_(targets, sources, MOMENTUM, impl=impl)

    def prepare(self, part, function, inputs):
        return inputs

    def work(self, part, function, prepared):
        with torch.no_grad():
            return function(*prepared)

    def run(self, part, function, inputs):
        return self.work(part, function, inputs)

    def operations(self, part, scheme="cpu"):
        """A difference, a product and a sum for each number."""
        return 3 * self.numbers

    def bytes(self, part):
        """Each target read and written, each source read."""
        return (8 + getattr(torch, self.dtype).itemsize) * self.numbers

    def small(self):
        return EMA("tiny", self.dtype)


CASES = {kind.op: kind for kind in (InfoNCE, BYOL, EMA)}


def resnet50_shapes():
    """The 161 parameter shapes of ResNet-50: 25.6 M numbers."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            wide_in = 4 * width if block else max(64, 2 * width) if width > 64 else 64
            for shape in ((width, wide_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if not block:
                shapes += [(4 * width, wide_in, 1, 1), (4 * width,), (4 * width,)]
    return [*shapes, (1000, 2048), (1000,)]


def vit_b_shapes():
    """The 152 parameter shapes of ViT-B/16: 86.6 M numbers."""
    width = 768
    shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(12):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,), (1000, width), (1000,)]


def tiny_shapes():
    """A few small tensors: to see that something works."""
    return [(32, 16, 3, 3), (32,), (32,), (10, 32), (10,)]


MODELS = {"ResNet-50": resnet50_shapes, "ViT-B": vit_b_shapes, "tiny": tiny_shapes}
