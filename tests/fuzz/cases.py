"""Run one case: draw its function, call it, and classify the outcome."""

import traceback
import warnings
from pathlib import Path

import bounds
import byol
import info_nce
import refusals
import retrieval
import torch
import updates
from draw import FLOATING, Draw
from process import CLASS

from selfsup_kernels.byol import reference as of_byol
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce import few_scores

FUNCTIONS = {
    "info_nce_loss": (info_nce.info_nce, 55, "info_nce"),
    "byol_loss": (byol.byol, 14, "byol"),
    "contrastive_stats": (retrieval.stats, 6, "info_nce"),
    "ema_update_": (updates.ema_update, 10, "ema_update_"),
    "EMA": (updates.ema_module, 3, "ema_update_"),
    "optim": (updates.optimizers, 3, "fused_sgd_"),
    "info_nce_loss, refused": (refusals.info_nce, 5, "info_nce"),
    "byol_loss, refused": (refusals.byol, 2, "byol"),
    "ema_update_, refused": (refusals.ema_update, 2, "ema_update_"),
}
"""name: (function of a case, its weight in the draw, the op that it calls)."""


class Place:
    """The device and implementation of a case, and the description that its failure prints."""

    def __init__(self, draw, device, impl, classes):
        self.device, self.impl, self.classes = device, impl, classes
        self.by_op = impl != "reference" or draw.chance(0.5)  # or by autograd
        gpu = impl in bounds.GPU_IMPLS
        self.slow = impl == "triton" and device == "cpu"  # interpreted
        self.dtypes = FLOATING[1:] if gpu else FLOATING
        self.autocast = draw.chance(0.1)
        self.says = ""

    def say(self, dtype, **facts):
        facts |= {} if self.by_op else {"by": "autograd"}
        told = [f"{name}={tuple(x.shape) if isinstance(x, torch.Tensor) else x}" for name, x in facts.items()]
        self.says = " ".join([str(dtype), *told, "autocast" if self.autocast else ""]).replace("torch.", "").strip()

    def loss_dtype(self, dtype):
        return torch.promote_types(dtype, torch.float32) if self.autocast else dtype

    def autocasting(self):
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast)


def run(seed, number, impl, device):
    """Run one case and return (function, dtype, outcome, message)."""
    draw = Draw(seed, number)
    classes = Draw(seed, "class", number // CLASS) if device != "cpu" else None
    place = Place(draw, device, impl, classes)
    chosen = classes or draw
    mine = {name: weight for name, (_, weight, op) in FUNCTIONS.items() if impl in ops.impls_of(op)}
    (name,) = chosen.choices(list(mine), list(mine.values()))
    takes = few_scores.takes, of_byol.takes
    if place.by_op:
        few_scores.takes = of_byol.takes = lambda *_: False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our hints, and overflow warnings of Triton's interpreter
            kind, outcome, note = FUNCTIONS[name][0](draw, place)
        return name, kind.removeprefix("torch."), outcome, note and f"{note} [{place.says}]"
    except bounds.Wrong as error:
        message = str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    finally:
        few_scores.takes, of_byol.takes = takes
    return name, place.says.partition(" ")[0] or "?", "WRONG", " ".join(f"{message} [{place.says}]".split())
