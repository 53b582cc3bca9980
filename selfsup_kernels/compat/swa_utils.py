"""Drop-ins for ``torch.optim.swa_utils``."""

import torch

from selfsup_kernels.core import validate as check
from selfsup_kernels.ema.api import ema_update_pairs_

__all__ = ["get_ema_multi_avg_fn"]


def get_ema_multi_avg_fn(decay=0.999):
    r"""``torch.optim.swa_utils.get_ema_multi_avg_fn`` for torch's ``AveragedModel``, with one call for all tensors.

    ::

        from selfsup_kernels.compat.swa_utils import get_ema_multi_avg_fn
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)

    :math:`t \leftarrow d\, t + (1 - d)\, s`, bit for bit as torch computes it where that is finite. Unlike torch's,
    the model may have another floating dtype than the average. ``AveragedModel`` does the rest: it copies on the first
    call of ``update_parameters``, pairs tensors by position, counts ``n_averaged``, and copies the buffers with
    ``use_buffers=False``. :class:`selfsup_kernels.EMA`, created where ``update_parameters`` is first called, computes
    the same average with ``buffers="copy"``, or with ``"average"`` for ``use_buffers=True``. It always copies integer
    buffers, while torch averages and truncates them with ``use_buffers=True``.

    Raises:
        ValueError: the decay is outside [0, 1].

    Example:
        >>> from selfsup_kernels.compat.swa_utils import get_ema_multi_avg_fn
        >>> model = nn.Linear(64, 8)
        >>> average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        >>> average.update_parameters(model)
    """
    if isinstance(decay, torch.Tensor):
        decay = check.scalar("decay", decay).item()
    decay = check.real("decay", decay)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}")

    @torch.no_grad()
    def ema_update(ema_param_list, current_param_list, _):
        if not ema_param_list:
            return
        first = ema_param_list[0]  # all share its dtype and device
        if first.is_floating_point() or first.is_complex():
            ema_update_pairs_(list(ema_param_list), list(current_param_list), None, decay, as_torch=True)
        else:
            for average, current in zip(ema_param_list, current_param_list, strict=True):
                average.copy_(average * decay + current * (1 - decay))

    return ema_update
