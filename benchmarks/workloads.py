"""The one definition of each measured workload: its inputs, our call, and what people call today.

The rivals are the strongest that PyTorch itself has: the losses as eager code without needless work, the same through
``torch.compile``, and ``torch._foreach_lerp_``.
"""

import functools

import torch
import torch.nn.functional as F

import selfsup_kernels as sk
from selfsup_kernels import backends

TEMPERATURE = 0.1


# ---------------------------------------------------------------- InfoNCE, two views


def eager_info_nce(views):
    """NT-Xent as it is usually written: one matrix of similarities, the diagonal masked, cross-entropy."""
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    scores = z @ z.T / TEMPERATURE
    rows = torch.arange(len(z), device=z.device)
    scores = scores.masked_fill(rows[:, None] == rows[None, :], -torch.inf)
    return F.cross_entropy(scores, rows.roll(batch))


@functools.cache
def _compiled(function):
    return torch.compile(function)


def our_info_nce(views, impl="auto"):
    return sk.info_nce_loss(views, temperature=TEMPERATURE, impl=impl)


INFO_NCE = {
    "eager": eager_info_nce,
    "compile": lambda views: _compiled(eager_info_nce)(views),
    "selfsup_kernels": our_info_nce,
}
INFO_NCE_SHAPES = ((256, 128), (1024, 128), (4096, 128), (2048, 512))
"""(B, D) of the two views."""


def info_nce_inputs(batch, dim, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    views = torch.randn(2, batch, dim, dtype=torch.float32, device=device, generator=generator).to(dtype)
    return (views.requires_grad_(),)


INFO_NCE_UNITS = {"cpu": {"forward": 1, "backward": 3}, "triton": {"forward": 1, "backward": 4}}
"""Matrix products executed, in units of M^2 D operations: half of one product of M x D with D x M each.

Both forwards take half of the symmetric matrix of similarities. The CPU's backward recomputes that half and adds each
tile to both of its sides; the GPU's, where every program owns its rows, recomputes all of it."""


def info_nce_operations(rows, dim, part, scheme):
    """Floating-point operations that ``scheme`` executes in its matrix products."""
    units = INFO_NCE_UNITS[scheme]
    return (sum(units.values()) if part == "both" else units[part]) * rows * rows * dim


# ---------------------------------------------------------------- BYOL, pairs


def eager_byol(predictions, targets):
    return (2 - 2 * (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(-1)).mean()


BYOL = {
    "eager": eager_byol,
    "compile": lambda p, t: _compiled(eager_byol)(p, t),
    "selfsup_kernels": sk.byol_loss,
}
BYOL_SHAPES = ((4096, 256), (32768, 256))


def byol_inputs(batch, dim, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    p, t = (torch.randn(batch, dim, device=device, generator=generator).to(dtype) for _ in range(2))
    return p.requires_grad_(), t


def byol_bytes(batch, dim, part, item_size):
    """What has to move: two reads forward; two reads and a write backward."""
    return {"forward": 2, "backward": 3, "both": 5}[part] * batch * dim * item_size


# ---------------------------------------------------------------- EMA of a model's parameters

MOMENTUM = 0.996


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


EMA_MODELS = {"ResNet-50": resnet50_shapes, "ViT-B": vit_b_shapes}


def ema_inputs(source_dtype, shapes=None, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = resnet50_shapes() if shapes is None else shapes
    targets, sources = ([torch.randn(s, device=device, generator=generator) for s in shapes] for _ in range(2))
    return targets, [x.to(source_dtype) for x in sources]


def ema_bytes(numbers, source_dtype):
    """Of float32 targets: each read and written, each source read."""
    return (8 + source_dtype.itemsize) * numbers


def foreach_lerp(targets, sources):
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def loop_of_lerp(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.float(), 1 - MOMENTUM)


def our_ema(targets, sources, impl="auto"):
    sk.ema_update_(targets, sources, MOMENTUM, impl=impl)


def our_ema_op(targets, sources, impl="auto"):
    """The kernel alone, without the checks of the public function."""
    backends.op("ema_update_", backends.select(impl, targets[0], "ema_update_", any_dtype=True))(
        targets, sources, None, MOMENTUM, None
    )


EMA = {
    "float32": {"foreach_lerp": foreach_lerp, "selfsup_kernels": our_ema},
    "bfloat16": {"loop of lerp_(x.float())": loop_of_lerp, "selfsup_kernels": our_ema},
}


# ---------------------------------------------------------------- running one


def clear(inputs):
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x.grad = None


def forward(function, inputs):
    """Without autograd: what evaluation costs."""
    with torch.no_grad():
        return function(*inputs)


def both(function, inputs):
    clear(inputs)
    function(*inputs).backward()
