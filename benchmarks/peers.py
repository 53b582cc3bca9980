"""Rivals outside PyTorch, each behind an adaptor: a function, or the reason why there is none.

All take the two views as one (2, B, D) tensor and work on the same M x M problem (M = 2B) as NT-Xent. What fused
linear cross-entropies cannot do is leave a row's similarity with itself out of its softmax: their losses differ from
NT-Xent by that term (``KEEPS_ITSELF``), not in their work. EMA's adaptor takes the targets and the sources, and makes
a call without arguments; it averages copies of its own.
"""

import importlib

import torch
import torch.nn.functional as F
import workloads as w
from torch.utils.checkpoint import checkpoint

KEEPS_ITSELF = "its loss keeps each row's similarity with itself"


def chunked_info_nce(views, chunk=4096):
    """NT-Xent in eager PyTorch with memory linear in the rows: some rows at a time, recomputed in the backward."""
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    partner = torch.arange(len(z), device=z.device).roll(batch)

    def some(own, z, start):
        scores = own @ z.T / w.TEMPERATURE
        diagonal = torch.arange(len(own), device=z.device)
        scores[diagonal, start + diagonal] = -torch.inf
        return F.cross_entropy(scores, partner[start : start + len(own)], reduction="sum")

    losses = [checkpoint(some, own, z, start * chunk, use_reentrant=False) for start, own in enumerate(z.split(chunk))]
    return torch.stack(losses).sum() / len(z)


def _rows_and_partners(views):
    num_views, batch, dim = views.shape
    z = F.normalize(views.reshape(num_views * batch, dim), dim=-1)
    return z, torch.arange(len(z), device=z.device).roll(batch)


def _inf_cl():
    from inf_cl import cal_inf_loss

    def loss(views):
        z, partner = _rows_and_partners(views)
        return cal_inf_loss(z / w.TEMPERATURE, z, labels=partner, head_dim=min(256, z.shape[1]))

    return loss


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    def loss(views):
        z, partner = _rows_and_partners(views)
        return linear_cross_entropy(z / w.TEMPERATURE, z, partner)

    return loss


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def loss(views):
        z, partner = _rows_and_partners(views)
        return cross_entropy(z, z / w.TEMPERATURE, partner)

    return loss


def _lightly():
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=w.TEMPERATURE)
    return lambda views: criterion(views[0], views[1])


def _timm(targets, sources):
    from timm.utils import ModelEmaV3

    model = torch.nn.ParameterList([torch.nn.Parameter(s) for s in sources])
    average = ModelEmaV3(model, decay=w.MOMENTUM)
    if {s.dtype for s in sources} != {t.dtype for t in targets}:
        average.module.to(targets[0].dtype)
    return lambda: average.update(model)


INFO_NCE = {
    "Inf-CL": ("inf_cl", _inf_cl),
    "cut-cross-entropy": ("cut_cross_entropy", _cut_cross_entropy),
    "Liger": ("liger_kernel", _liger),
    "lightly": ("lightly", _lightly),
}
NOTES = dict.fromkeys(("Inf-CL", "cut-cross-entropy", "Liger"), KEEPS_ITSELF)
EMA = {"timm": ("timm", _timm)}


def load(table, name, *arguments):
    """``(what the adaptor makes, None)``, or ``(None, why the peer cannot be used)``."""
    package, adaptor = table[name]
    try:
        importlib.import_module(package)
        return adaptor(*arguments), None
    except ImportError as error:
        return None, f"absent: {error}"
    except Exception as error:  # a peer that fails while it is imported shall not hide the others
        return None, f"{type(error).__name__}: {error}"
