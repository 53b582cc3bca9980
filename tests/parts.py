"""Run what the processes of a group do for one loss, one after the other in this process."""

import torch
from helpers import assert_within, info_nce_call, randn, run, temperature_rounding

from selfsup_kernels import spec
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce import exchange
from selfsup_kernels.info_nce.call import Saved


def in_parts(impl, views, sizes, temperature, upstream, objective, queue=None, core=-1, normalize=True, **pairs):
    """Return (losses (V, B), gradients of the views and the temperature); process r has ``sizes[r]`` samples.
    ``pairs``: labels or duplicates, and logq."""
    labels, duplicates, logq = (pairs.get(name) for name in ("labels", "duplicates", "logq"))
    call = info_nce_call(
        views, labels, queue, objective, core, normalize, duplicates=duplicates, temperature=temperature
    )
    ids = labels if duplicates is None else duplicates
    if logq is not None:
        logq = exchange.relative(logq.expand(views.shape[:2]), views.dtype)
    calls = [call._replace(first=sum(sizes[:r]), count=size) for r, size in enumerate(sizes)]
    forward, backward = (ops.overload(f"info_nce_{way}", impl) for way in ("forward", "backward"))
    results = [forward(list(views.unbind(0)), ids, logq, queue, None, *call) for call in calls]
    saved = [Saved(*tables) for _, *tables in results]
    rows = torch.cat([exchange.own_rows(*pair) for pair in zip(saved, calls, strict=True)], 1)
    assert rows.isfinite().logical_or(rows.isinf()).all(), "an owned row has no table"
    gradients = [
        backward(upstream, *exchange.with_all_rows(tables, call, rows), ids, *call, True, views.dtype)
        for tables, call in zip(saved, calls, strict=True)
    ]
    return (
        torch.cat([loss for loss, *_ in results], 1).to(views.dtype),
        torch.cat([grad for grad, _ in gradients], 1),
        sum(t for _, t in gradients).to(views.dtype),
    )


def compare_parts(impl, views, sizes, objective, temperature=0.1, queue=None, core=-1, normalize=True, **pairs):
    """Compare values and gradients of ``in_parts`` with the dense loss of the whole batch."""
    assert sum(sizes) == views.shape[1]
    dtype = views.dtype
    upstream = randn(*views.shape[:2], dtype=ops.accumulation_dtype(dtype), seed=99).to(views.device)
    # The kernels take the temperature as a number, rounded to the dtype of the views.
    number = torch.tensor(temperature, dtype=dtype).item()
    known = {"objective": objective, "core_view": core if core >= 0 else None, "normalize": normalize, **pairs}
    ours = in_parts(impl, views, sizes, number, upstream, objective, queue, core, normalize, **pairs)

    def oracle(x, t, q):
        return run(spec.info_nce_loss, x, t, upstream, queue=q, reduction="none", **known)

    truth = oracle(views.double(), number, None if queue is None else queue.double())
    eager = None if dtype == torch.float64 else oracle(views, number, queue)
    wide = None if queue is None else queue.double()
    mean = {name: value for name, value in known.items() if name != "normalize"}
    floor = upstream.numel() * temperature_rounding(views, torch.tensor(number, dtype=dtype), queue=wide, **mean)
    floors = (0.0, 0.0, 0.0 if eager is None else floor)
    for i, name in enumerate(("loss", "grad", "temperature")):
        assert_within(name, ours[i], truth[i], None if eager is None else eager[i], floors[i])
