"""Compare InfoNCE's kernels with the dense loss in float64 where pairs differ: duplicates, classes across views and
logq."""

import math

import pytest
import torch
from guard import guarded
from helpers import assert_within, compare_info_nce, info_nce_call, randn, random_labels, run, temperature_rounding
from parts import compare_parts

from selfsup_kernels import info_nce_loss, spec
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce import exchange
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.tiles import configs, launcher

IMPL = "triton"


FORMS = {
    "duplicates": {"objective": "supcon_out"},
    "classes across views": {"objective": "cross_view"},
    "logq": {"objective": "supcon_out"},
    "logq and labels": {"objective": "per_positive"},
    "logq and duplicates": {"objective": "pairwise"},
    "logq and classes across views": {"objective": "cross_view"},
}
"""Each new kind of pairs, with an objective."""


def arguments_of(form, num_views, batch, device, classes=9, size=3.0):
    """Return the arguments of one of ``FORMS``."""
    ids = random_labels(batch, classes).to(device)
    name = "labels" if "labels" in form or "classes" in form else "duplicates" if "duplicates" in form else None
    found = {name: ids} if name else {}
    if "logq" in form:
        found["logq"] = size * randn(num_views, batch, seed=5).to(device)
    return FORMS[form] | found


@pytest.mark.parametrize("ids", [1, 9, 10**6])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates(impl, path, device, dtype, objective, ids):
    """Duplicates are right if all samples are (no negatives are left), if some are, and if none is."""
    views = randn(2, 71, 20, dtype=dtype).to(device)
    compare_info_nce(impl, views, objective=objective, duplicates=random_labels(71, ids).to(device))


@pytest.mark.parametrize("core_view", [None, 1])
@pytest.mark.parametrize("objective", ["supcon_in", "pairwise", "cross_view"])
def test_duplicates_with_a_queue_and_a_core_view(impl, path, device, objective, core_view):
    views, queue = randn(3, 33, 20).to(device), randn(40, 20, seed=1).to(device)
    ids = random_labels(33, 7).to(device)
    compare_info_nce(impl, views, objective=objective, duplicates=ids, queue=queue, core_view=core_view)


@pytest.mark.parametrize("length", [0, 40])
@pytest.mark.parametrize(("classes", "num_views"), [(1, 2), (5, 2), (50, 3)])
def test_classes_across_views(impl, path, device, dtype, classes, num_views, length):
    """An anchor has all rows of its class in another view as positives; many classes have one sample, or few."""
    views = randn(num_views, 69, 20, dtype=dtype).to(device)
    queue = randn(length, 20, dtype=dtype, seed=1).to(device) if length else None
    labels = random_labels(69, classes).to(device)
    compare_info_nce(impl, views, objective="cross_view", labels=labels, queue=queue)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logq(impl, path, device, dtype, objective):
    logq = (3 * randn(2, 71, seed=5)).to(device)
    views = randn(2, 71, 20, dtype=dtype).to(device)
    compare_info_nce(impl, views, objective=objective, logq=logq)


@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_logq_and_labels(impl, path, device, dtype, objective):
    views, labels = randn(2, 45, 20, dtype=dtype).to(device), random_labels(45, 4).to(device)
    logq = (3 * randn(2, 45, seed=5)).to(device)
    compare_info_nce(impl, views, objective=objective, labels=labels, logq=logq)


@pytest.mark.parametrize(
    ("spread", "form"),
    [
        (60.0, "logq"),
        (400.0, "logq and labels"),
        (60.0, "logq and duplicates"),
        (400.0, "logq and classes across views"),
    ],
)
def test_logq_of_any_spread(impl, path, device, form, spread):
    """The rarest rows' exponentials and weights leave the range of the fast path."""
    arguments = arguments_of(form, 2, 66, device)
    arguments["logq"] = spread * (torch.arange(132, device=device).view(66, 2).T % 33) / 32 - 7
    compare_info_nce(impl, randn(2, 66, 20).to(device), **arguments)


def test_a_common_row_among_rare_ones(impl, path, device):
    """Only rows whose common row is left out have sums that are too small, and are summed again."""
    logq = torch.full((2, 70), 150.0)
    logq[:, 5] = 0
    compare_info_nce(impl, randn(2, 70, 20).to(device), 0.05, logq=logq.to(device))


@pytest.mark.parametrize("form", FORMS)
def test_a_low_temperature(impl, path, device, dtype, form):
    views = randn(2, 37, 33, dtype=dtype).to(device)
    # At low temperatures the temperature's gradient is a small sum of large terms.
    compare_info_nce(impl, views, 0.005, cancels=True, **arguments_of(form, 2, 37, device))


@pytest.mark.parametrize("form", FORMS)
def test_adversarial_row(impl, path, device, form):
    """One anchor with all negatives opposite to it is right, whose sum alone underflows."""
    views = randn(2, 40, 8)
    views[:, :, 0] += 60
    views[0, 7] *= -1
    compare_info_nce(impl, views.to(device), 0.01, cancels=True, **arguments_of(form, 2, 40, device, 30))


@pytest.mark.parametrize("form", FORMS)
def test_unnormalised(impl, path, device, form):
    temperature = 2.0
    views = 30 * randn(2, 33, 12, seed=7).to(device)
    arguments = arguments_of(form, 2, 33, device) | {"normalize": False}
    score = views.double().square().sum(-1).max() / temperature
    _, grad, slope = run(spec.info_nce_loss, views.double(), temperature, **arguments)
    floor = (4 * torch.finfo(torch.float32).eps * score * max(grad.norm(), slope.abs())).item()
    compare_info_nce(impl, views, temperature, floor=floor, **arguments)


@pytest.mark.parametrize("size", [(2, 2, 1), (3, 65, 33)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sizes(impl, path, device, form, size):
    views = randn(*size, seed=1).to(device)
    # Rows of one feature are +-1 after normalisation: their gradient is zero up to rounding.
    floor = 16 * torch.finfo(views.dtype).eps / 0.1 / views.abs().min().item() if size[2] == 1 else 0.0
    compare_info_nce(impl, views, floor=floor, cancels=size[2] > 1, **arguments_of(form, size[0], size[1], device))


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (300, torch.float32)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shipped_configurations(impl, device, form, width, dtype):
    """The shipped configurations are right with more rows than a tile."""
    views = randn(2, 130, width, dtype=dtype).to(device)
    compare_info_nce(impl, views, cancels=True, **arguments_of(form, 2, 130, device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("clean", "batch"), [((64, 64), 200), ((64, 128), 130)], ids=str)
def test_masked_and_clean_tiles_share_the_pairs(impl, device, monkeypatch, clean, form, batch):
    monkeypatch.setattr(launcher, "MANY_TILES", 0)
    monkeypatch.setattr(launcher, "deterministic", lambda: False)
    masked = {(64, 64): (32, 32), (64, 128): (64, 32)}[clean]
    shapes = {"sums": clean, "masked_sums": masked, "gradient": clean[::-1], "masked_gradient": masked[::-1]}

    def chosen(kernel, architecture, kind, width):
        m, n = shapes.get(kernel, (32, 32))
        return configs.Config(block_m=m, block_n=n, block_k=16, num_warps=4, num_stages=2)

    monkeypatch.setattr(configs, "_lookup", chosen)
    compare_info_nce(impl, randn(2, batch, 16).to(device), **arguments_of(form, 2, batch, device))


@pytest.mark.parametrize("form", FORMS)
def test_weighted_anchors(impl, path, device, dtype, form):
    views = randn(3, 20, 12, dtype=dtype).to(device)
    arguments = arguments_of(form, 3, 20, device, 6) | {"reduction": "none"}
    upstream = randn(3, 20, seed=1).to(device)
    upstream[:, ::3] = 0  # a pair has a gradient although one of its anchors has none
    got, eager, want = (
        run(function, x, torch.tensor(0.1, dtype=dtype).to(x.dtype), upstream, **arguments, **extra)
        for function, x, extra in (
            (info_nce_loss, views, {"impl": impl}),
            (spec.info_nce_loss, views, {}),
            (spec.info_nce_loss, views.double(), {}),
        )
    )
    # The temperature's gradient is a small sum of large terms.
    number, mean = torch.tensor(0.1, dtype=dtype), arguments | {"reduction": "mean"}
    floor = 60 * upstream.abs().max().item() * temperature_rounding(views, number, **mean)
    for i, name in enumerate(("loss", "grad", "temperature")):
        assert_within(name, got[i], want[i], eager[i], floor if name == "temperature" else 0.0)


@pytest.mark.parametrize("kind", [torch.int64, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("form", ["duplicates", "classes across views"])
def test_ids_of_any_integer_type_and_stride(impl, path, device, form, kind):
    arguments = arguments_of(form, 2, 37, device)
    ids = torch.zeros(37, 3, dtype=kind, device=device)
    (name,) = arguments.keys() - {"objective"}
    ids[:, 1] = (arguments[name] + 3).to(kind) * 2
    views = randn(2, 37, 12).to(device)
    compare_info_nce(impl, views, **arguments | {name: ids[:, 1]})
    if kind == torch.int64:
        compare_info_nce(impl, views, **arguments | {name: ids[1, 1].expand(37)})


@pytest.mark.parametrize("labels", [None, 3, 1])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_decoupled_without_negatives(impl, path, device, labels, value):
    """Anchors that have no negatives have loss 0 and no gradient, unless their rows are NaN."""
    views = randn(2, 33, 8)
    views[1, 5, 2] += value
    ids = torch.zeros(33, dtype=torch.int64)
    if labels == 3:
        ids[:30] = 1  # one class has many negatives, the other few
    name = "duplicates" if labels is None else "labels"
    arguments = {"objective": "decoupled", "reduction": "none", name: ids.to(device)}
    got = run(info_nce_loss, views.to(device), 0.1, impl=impl, **arguments)
    want = run(info_nce_loss, views.to(device), 0.1, impl="reference", **arguments)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[0] == 0, want[0] == 0)
    if value == 0:
        for name, ours, theirs in zip(("loss", "grad", "temperature"), got, want, strict=True):
            assert_within(name, ours, theirs.double())


@pytest.mark.parametrize(("value", "normalize"), [(math.nan, True), (math.inf, False)])
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_inf_give_what_the_dense_loss_gives(impl, path, device, form, value, normalize):
    views = 0.3 * randn(2, 33, 8).to(device)
    views[1, 5, 2] = value
    arguments = arguments_of(form, 2, 33, device) | {"reduction": "none", "normalize": normalize}
    got = run(info_nce_loss, views, 0.1, impl=impl, **arguments)
    want = run(spec.info_nce_loss, views, 0.1, **arguments)
    assert torch.equal(got[0].isfinite(), want[0].isfinite())
    assert not got[0].isfinite().all()
    if normalize:
        assert torch.equal(got[1].isnan(), want[1].isnan())


@pytest.mark.parametrize("size", [(2, 33, 20), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_or_written_past_an_end(impl, path, device, monkeypatch, form, size):
    """Every input and output ends at a guard page, and nothing past it is accessed; outputs start as NaN."""
    if device.type != "cpu":
        pytest.skip("pages that cannot be touched are the CPU's")

    def fenced(shape, dtype, device):
        return guarded(torch.full(shape if isinstance(shape, tuple) else (shape,), math.nan).to(dtype))

    monkeypatch.setattr(launcher, "empty", fenced)
    monkeypatch.setattr(
        "selfsup_kernels.info_nce.api.relative", lambda *a: None if a[0] is None else guarded(exchange.relative(*a))
    )
    views = [guarded(v).requires_grad_() for v in randn(*size)]
    arguments = {
        name: guarded(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments_of(form, size[0], size[1], device, 5).items()
    }
    queue = None if "logq" in form else guarded(randn(7, size[2], seed=2))
    loss = info_nce_loss(views, temperature=0.1, queue=queue, reduction="none", impl=impl, **arguments)
    loss.backward(guarded(randn(*size[:2], seed=3)))
    assert loss.isfinite().all()
    assert all(v.grad.isfinite().all() for v in views)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(impl, device, form):
    arguments = arguments_of(form, 2, 20, device, 5)
    views, logq = list(randn(2, 20, 12).to(device).unbind(0)), arguments.pop("logq", None)
    ids = arguments.get("labels", arguments.get("duplicates"))
    call = info_nce_call(views, reduction="mean", **arguments)
    logq = None if logq is None else logq - logq.min()
    tensors = (views, ids, logq, None, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.overload("info_nce_forward", impl), (*tensors, *call), test_utils=checks)
    loss, *saved = ops.overload("info_nce_forward", impl)(*tensors, *call)
    torch.library.opcheck(
        ops.overload("info_nce_backward", impl),
        (torch.ones_like(loss), *saved, ids, *call, True, torch.float32),
        test_utils=checks,
    )


@pytest.mark.parametrize("form", FORMS)
def test_parts(impl, path, device, dtype, form):
    """The shares of several processes make the loss and the gradient of the whole batch."""
    sizes = (17, 1, 24)
    arguments = arguments_of(form, 2, sum(sizes), device, 20)
    views = randn(2, sum(sizes), 20, dtype=dtype).to(device)
    queue = randn(9, 20, dtype=dtype, seed=1).to(device) if "logq" not in form else None
    compare_parts(impl, views, sizes, arguments.pop("objective"), queue=queue, **arguments)


@pytest.mark.parametrize("form", FORMS)
def test_parts_out_of_range(impl, path, device, form):
    """If one process's weights leave the fast path's range, all processes take the slow path."""
    views = torch.nn.functional.normalize(randn(2, 40, 20), dim=-1)
    views[:, 20:] *= -1
    arguments = arguments_of(form, 2, 40, device, 30)
    compare_parts(impl, views.to(device), (11, 29), arguments.pop("objective"), temperature=0.004, **arguments)


@pytest.mark.parametrize("path", ["waves"], indirect=True)
@pytest.mark.parametrize("form", ["classes across views", "logq and classes across views"])
def test_a_part_that_begins_past_the_padding(impl, path, device, form):
    arguments = arguments_of(form, 2, 310, device, 150)
    compare_parts(impl, randn(2, 310, 16).to(device), (290, 20), arguments.pop("objective"), **arguments)
