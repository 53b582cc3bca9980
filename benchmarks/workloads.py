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


def our_info_nce(views):
    return sk.info_nce_loss(views, temperature=TEMPERATURE)


INFO_NCE = {
    "eager": eager_info_nce,
    "compile": lambda views: _compiled(eager_info_nce)(views),
    "selfsup_kernels": our_info_nce,
}
INFO_NCE_SHAPES = ((256, 128), (1024, 128), (4096, 128), (2048, 512))
"""(B, D) of the two views."""


def info_nce_inputs(batch, dim, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(2, batch, dim, dtype=dtype, requires_grad=True),)


def info_nce_operations(batch, dim):
    """Floating-point operations of the symmetric scheme, forward and backward: 1 + 3 units of M^2 D."""
    rows = 2 * batch
    return {"forward": rows * rows * dim, "backward": 3 * rows * rows * dim, "both": 4 * rows * rows * dim}


# ---------------------------------------------------------------- BYOL, pairs


def eager_byol(predictions, targets):
    return (2 - 2 * (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(-1)).mean()


BYOL = {
    "eager": eager_byol,
    "compile": lambda p, t: _compiled(eager_byol)(p, t),
    "selfsup_kernels": sk.byol_loss,
}
BYOL_SHAPES = ((4096, 256), (32768, 256))


def byol_inputs(batch, dim, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(batch, dim, dtype=dtype, requires_grad=True), torch.randn(batch, dim, dtype=dtype)


# ---------------------------------------------------------------- EMA, ResNet-50's parameters

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


def ema_inputs(source_dtype):
    torch.manual_seed(0)
    targets = [torch.randn(shape) for shape in resnet50_shapes()]
    return targets, [torch.randn_like(t).to(source_dtype) for t in targets]


def foreach_lerp(targets, sources):
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def loop_of_lerp(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.float(), 1 - MOMENTUM)


def our_ema(targets, sources):
    sk.ema_update_(targets, sources, MOMENTUM)


def our_ema_op(targets, sources):
    """The kernel alone, without the checks of the public function."""
    backends.op("ema_update_", backends.select("auto", targets[0]))(targets, sources, None, MOMENTUM, None)


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
