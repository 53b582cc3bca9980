"""The ops ``ema_update_``, ``fused_sgd_`` and ``fused_adamw_``, and two that check lists of tensors."""

import torch

from selfsup_kernels.core.ops import NAMESPACE, define
from selfsup_kernels.ema import optim_reference, reference


def _in_place(*args):
    return None


# seed: a 0-dim int64 tensor enables stochastic rounding of bfloat16 and float16 targets.
define(
    "ema_update_",
    "(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum, Tensor? seed) -> ()",
    gpu="cuda",
    reference=reference.update_,
    fake=_in_place,
)
# Step an optimizer, then run ema_update_ of targets from params; an empty tensor stands for no target.
# momentum_buffers may be an empty list. scales: a float64 factor for each parameter's decayed gradient (LARS).
define(
    "fused_sgd_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] targets, Tensor? lr_tensor,"
    " float lr, Tensor? ema_tensor, float ema, Tensor? seed, Tensor? scales, float weight_decay, float momentum,"
    " float dampening, bool nesterov, bool maximize, bool first) -> ()",
    gpu="cuda",
    reference=optim_reference.sgd_,
    fake=_in_place,
)
define(
    "fused_adamw_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] targets,"
    " Tensor? lr_tensor, float lr, Tensor? ema_tensor, float ema, Tensor? seed, float step, float beta1,"
    " float beta2, float eps, float weight_decay, bool maximize) -> ()",
    gpu="cuda",
    reference=optim_reference.adamw_,
    fake=_in_place,
)

# Only the C++ extension implements these two; they have no fake, because nothing calls them while tracing.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# Return the number of pairs without elements; -1 if the pairs need a closer look or operators of their own.
_library.define("ema_check_pairs(Tensor[] targets, Tensor[] sources, bool averaged) -> int")
# Check, and if there is nothing to look at, average the first `averaged` pairs (CPU tensors) and copy the others.
# Return False, without a write, if there is.
_library.define("ema_update_pairs_(Tensor(a!)[] targets, Tensor[] sources, int averaged, float momentum) -> bool")
for _name in ("ema_check_pairs", "ema_update_pairs_"):
    # They are called without gradients, so the autograd keys would only look at each tensor once more.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
