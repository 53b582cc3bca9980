"""Compare every InfoNCE kernel and path with the dense loss in float64, at sizes that are no multiple of a tile."""

import math
import random

import pytest
import torch
from guard import guarded
from helpers import EVERY_CASE, assert_within, compare_info_nce, info_nce_call, randn, random_labels, run

from selfsup_kernels import info_nce_loss, spec
from selfsup_kernels.core import ops
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles import gradient as triton_gradient

IMPL = "triton"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def restored_precision():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("size", [(2, 71, 20), (3, 40, 20)], ids=str)  # three blocks and two blocks
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(impl, path, device, dtype, objective, size):
    compare_info_nce(impl, randn(*size, dtype=dtype).to(device), objective=objective)


@pytest.mark.parametrize("classes", [1, 4, 10**6])
@pytest.mark.parametrize("objective", LABEL_OBJECTIVES)
def test_labels(impl, path, device, dtype, objective, classes):
    """Labels are right with one class (only the queue has negatives), few classes, and one class per sample."""
    labels = random_labels(45, classes).to(device)
    queue = randn(10, 20, dtype=dtype, seed=1).to(device) if classes == 1 else None
    views = randn(2, 45, 20, dtype=dtype).to(device)
    compare_info_nce(impl, views, objective=objective, labels=labels, queue=queue)


@pytest.mark.parametrize("objective", [o for o in LABEL_OBJECTIVES if o != "cross_view"])
def test_labels_of_one_view(impl, path, device, objective):
    """With one view, anchors that are alone in their class have no positives."""
    views = randn(1, 40, 12).to(device)
    compare_info_nce(impl, views, objective=objective, labels=random_labels(40, 25).to(device))


@pytest.mark.parametrize(("length", "core_view"), [(1, None), (40, 1)])
@pytest.mark.parametrize("objective", ["supcon_in", "pairwise", "cross_view"])
def test_queue_and_core_view(impl, path, device, objective, length, core_view):
    views, queue = randn(3, 33, 20).to(device), randn(length, 20, seed=1).to(device)
    compare_info_nce(impl, views, objective=objective, queue=queue, core_view=core_view)


@pytest.mark.parametrize("temperature", [0.5, 0.02, 0.01, 0.005, 0.001])
@pytest.mark.parametrize("objective", ["supcon_out", "per_positive", "pairwise"])
def test_temperatures(impl, path, device, dtype, objective, temperature):
    """Low temperatures are right, where every row's sum underflows and is recomputed and weights need the slow path."""
    compare_info_nce(impl, randn(2, 37, 33, dtype=dtype).to(device), temperature, objective=objective)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [0.0143, 0.0128, 0.01])
def test_adversarial_row(impl, path, device, temperature, labelled):
    """One anchor with all negatives opposite to it is right: only its sum underflows at these temperatures."""
    views = randn(2, 40, 8)
    views[:, :, 0] += 60
    views[0, 7] *= -1
    labels = torch.arange(40, device=device) % 30 if labelled else None
    compare_info_nce(impl, views.to(device), temperature, labels=labels)


@pytest.mark.parametrize(("size", "temperature"), [(1.0, 1.0), (1.0, 0.05), (30.0, 2.0), (1e-3, 0.1)])
@pytest.mark.parametrize("objective", ["supcon_out", "cross_view"])
def test_unnormalised(impl, path, device, objective, size, temperature):
    views = size * randn(3, 33, 12, seed=7).to(device)
    # Tensor cores truncate in each of the few accumulation steps of a score; a pair's gradient is exp(score).
    score = views.double().square().sum(-1).max() / temperature
    _, grad, slope = run(spec.info_nce_loss, views.double(), temperature, objective=objective, normalize=False)
    floor = (4 * torch.finfo(torch.float32).eps * score * max(grad.norm(), slope.abs())).item()
    compare_info_nce(impl, views, temperature, objective=objective, normalize=False, floor=floor)


@pytest.mark.parametrize(("batch", "dim"), [(2, 1), (3, 130), (32, 16), (33, 5), (64, 1), (65, 33)])
def test_widths_and_batches(impl, path, device, dtype, batch, dim):
    views = randn(2, batch, dim, dtype=dtype, seed=1).to(device)
    # Rows of one feature are +-1 after normalisation: their gradient is zero up to rounding.
    floor = 16 * torch.finfo(dtype).eps / 0.1 / views.double().abs().min().item() if dim == 1 else 0.0
    compare_info_nce(impl, views, floor=floor)


@pytest.mark.parametrize("width", [16, 64, 128, 256, 300])
def test_shipped_configurations(impl, device, dtype, width):
    """The shipped configurations are right with more rows than a tile, and a queue."""
    views, queue = randn(2, 150, width, dtype=dtype).to(device), randn(20, width, dtype=dtype, seed=1).to(device)
    compare_info_nce(impl, views, queue=queue)


def test_negative_scores_and_padding(impl, path, device, dtype):
    """Opposed modalities are right: weights exceed 1, and padding columns would have the highest scores."""
    views = randn(2, 72, 16, dtype=torch.float64)
    views[0, :, 0] += 8
    views[1, :, 0] -= 8
    compare_info_nce(impl, views.to(dtype).to(device), 0.07, objective="cross_view")


@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_scores_of_any_size_stay_finite(impl, path, device, size):
    views = size * randn(2, 40, 48).to(device)
    loss, grad, _ = run(info_nce_loss, views, 1.0, normalize=False, impl=impl)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().max() <= 4 * views.abs().max()  # a mean of differences of rows


def test_gradient_at_scores_of_tens_of_thousands(impl, path, device):
    """The error on long rows is within the limit of docs/numerics.md; eager is much more accurate here."""
    views = 30 * randn(2, 40, 48).to(device)
    got = run(info_nce_loss, views, 1.0, normalize=False, impl=impl)[1]
    want = run(spec.info_nce_loss, views.double(), 1.0, normalize=False)[1]
    assert (got - want).norm() <= 1e-2 * want.norm()  # 1e-3 if products are rounded, not truncated


@pytest.mark.parametrize("batch", [65, 130, 200])
@pytest.mark.parametrize("form", ["plain", "two classes", "one class", "core"])
@pytest.mark.parametrize("clean", [(64, 64), (32, 64), (64, 128)], ids=str)
def test_masked_and_clean_tiles_share_the_pairs(impl, device, monkeypatch, clean, form, batch):
    """Masked and clean tiles cover all pairs, for several pairs of tile shapes and classes that span blocks."""
    place = torch.arange(batch, device=device)
    arguments = {
        "plain": {},
        "two classes": {"labels": (place >= batch // 5).long()},  # the larger one begins inside a block
        "one class": {"labels": place * 0, "queue": randn(70, 16, seed=1).to(device)},
        "core": {"core_view": 1, "objective": "cross_view", "queue": randn(70, 16, seed=1).to(device)},
    }[form]
    monkeypatch.setattr(launcher, "MANY_TILES", 0)
    monkeypatch.setattr(launcher, "deterministic", lambda: False)
    masked = {(64, 64): (32, 32), (32, 64): (16, 64), (64, 128): (64, 32)}[clean]
    shapes = {"sums": clean, "masked_sums": masked, "gradient": clean[::-1]}
    shapes["masked_gradient"] = (min(masked[1], clean[1]), min(masked[0], clean[0]))

    def chosen(kernel, architecture, kind, width):
        m, n = shapes.get(kernel, (32, 32))
        return configs.Config(block_m=m, block_n=n, block_k=16, num_warps=4, num_stages=2)

    monkeypatch.setattr(configs, "_lookup", chosen)
    compare_info_nce(impl, randn(2, batch, 16).to(device), **arguments)


@pytest.mark.parametrize("form", ["plain", "labels", "queue"])
def test_sums_over_many_columns_are_made_by_several_launches(impl, path, device, monkeypatch, restored_precision, form):
    """Several launches give the same sums as one, up to rounding."""
    if path != "clean+masked":
        pytest.skip("a limit of the kernel that keeps its sums in registers, where few programs share the columns")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # exact float32 products have no column limit
    views = randn(2, 150, 20).to(device)
    arguments = {
        "plain": {},
        "labels": {"labels": random_labels(150, 3).to(device)},
        "queue": {"queue": randn(200, 20, seed=1).to(device)},
    }[form]
    launches, launch = [], launcher.launch
    monkeypatch.setattr(launcher, "launch", lambda kernel, *a, **o: (launches.append(kernel), launch(kernel, *a, **o)))
    want = run(info_nce_loss, views, 0.1, impl=impl, **arguments)
    few = launches.count("gradient_kernel")
    launches.clear()
    monkeypatch.setattr(triton_gradient, "MOST_COLUMNS", 64)
    got = run(info_nce_loss, views, 0.1, impl=impl, **arguments)
    assert launches.count("gradient_kernel") > few == 2
    assert (got[1] - want[1]).norm() <= 1e-5 * want[1].norm()


def test_shipped_tiles_with_masks_divide_those_without():
    for entries in configs._table().values():
        for kernel in ("sums", "gradient"):
            for kind, widths in entries[kernel].items():
                for width, entry in widths.items():
                    masked = configs.Config(**entries[f"masked_{kernel}"][kind][width])
                    configs.check_divides(kernel, configs.Config(**entry), masked)
        for kernel in ("wave", "masked_wave"):
            for kind, widths in entries[kernel].items():
                for width, entry in widths.items():
                    assert entry["block_n"] % entries["product"][kind][width]["block_k"] == 0


@pytest.mark.parametrize("wrong", ["masked_gradient", "gradient", "sums"])
def test_a_table_whose_tiles_do_not_fit_the_rows_is_refused(impl, device, monkeypatch, wrong):
    monkeypatch.setattr(launcher, "MANY_TILES", 0)
    monkeypatch.setattr(launcher, "deterministic", lambda: False)
    shipped = configs._lookup("gradient", 90, "half", "64")
    fits = shipped._replace(block_m=32, block_n=32, descriptor=False)
    entries = dict.fromkeys(("sums", "masked_sums", "gradient", "masked_gradient"), fits)
    with configs.override(entries | {wrong: fits._replace(block_k=48 if wrong == "sums" else 128)}):
        views = randn(2, 200, 64, dtype=torch.bfloat16).to(device).requires_grad_()
        with pytest.raises(ValueError, match=r"block_k must divide|must hold all 64 numbers"):
            info_nce_loss(views, impl=impl).backward()


@pytest.mark.parametrize("descriptor", [False, True])
def test_descriptors_and_pointers_load_the_same(impl, path, device, monkeypatch, descriptor):
    inner = configs._lookup

    def chosen(*key):
        config = inner(*key)
        return None if config is None else config._replace(descriptor=descriptor)

    monkeypatch.setattr(configs, "_lookup", chosen)
    queue = randn(50, 40, seed=1).to(device)
    compare_info_nce(impl, randn(2, 50, 40).to(device), queue=queue)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("labelled", [False, True])
def test_reductions(impl, path, device, dtype, reduction, labelled):
    views = randn(3, 20, 12, dtype=dtype).to(device)
    labels = random_labels(20, 6).to(device) if labelled else None
    upstream = randn(3, 20, seed=1).to(device) if reduction == "none" else torch.tensor(-1.75e-6, device=device)
    arguments = {"objective": "supcon_in", "reduction": reduction, "labels": labels}
    got, eager, want = (
        run(function, x, torch.tensor(0.1, dtype=dtype).to(x.dtype), upstream, **arguments, **extra)
        for function, x, extra in (
            (info_nce_loss, views, {"impl": impl}),
            (spec.info_nce_loss, views, {}),
            (spec.info_nce_loss, views.double(), {}),
        )
    )
    for name, ours, theirs, truth in zip(("loss", "grad", "temperature"), got, eager, want, strict=True):
        assert_within(name, ours, truth, theirs)


def test_upstream_gradient_may_be_expanded_zero_or_partial(impl, path, device):
    views = randn(2, 33, 6).to(device)
    mask = torch.zeros(2, 33, device=device)
    mask[1, 3] = 1e-30
    for upstream in (torch.tensor(0.5, device=device).expand(2, 33), mask, mask * 0, mask.T.contiguous().T):
        got = run(info_nce_loss, views, 0.1, upstream, reduction="none", impl=impl)
        want = run(spec.info_nce_loss, views.double(), 0.1, upstream.double(), reduction="none")
        assert_within("grad", got[1], want[1])
        assert_within("temperature", got[2].cpu(), want[2].cpu())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("objective", ["supcon_in", "cross_view", "decoupled"])
def test_nan_and_inf_give_what_the_dense_loss_gives(impl, path, device, objective, value, normalize):
    views = 0.3 * randn(2, 33, 8).to(device)
    views[1, 5, 2] = value
    arguments = {"reduction": "none", "objective": objective, "normalize": normalize}
    got = run(info_nce_loss, views, 0.1, impl=impl, **arguments)
    want = run(spec.info_nce_loss, views, 0.1, **arguments)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[0].isinf(), want[0].isinf())
    assert not got[0].isfinite().all()
    if normalize:
        assert torch.equal(got[1].isnan(), want[1].isnan())
    else:  # the gradient of an infinite loss: Inf * 0 is NaN in one implementation and 0 in another
        assert not got[1].isfinite().all()


def test_a_row_whose_square_float32_cannot_hold(impl, path, device):
    """A row whose squared norm overflows float32 does not spoil the losses of other rows."""
    views = 0.3 * randn(2, 33, 8).to(device)
    views[1, 5, 2] = 3e38
    got, want = (run(info_nce_loss, views, 0.1, reduction="none", normalize=False, impl=i) for i in (impl, "reference"))
    small = want[0] < 1e3  # rows whose lowest score is the one with that row
    assert small.sum() > 20
    torch.testing.assert_close(got[0][small], want[0][small], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["new", "legacy"])
def test_tf32_where_pytorch_allows_it(impl, device, restored_precision, setting):
    """With either setting of TF32 the error is larger than float32's and within TF32's."""
    views = randn(2, 40, 64).to(device)
    exact = run(info_nce_loss, views, 0.1, impl=impl)
    if setting == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    fast = run(info_nce_loss, views, 0.1, impl=impl)
    want = run(spec.info_nce_loss, views.double(), 0.1)
    near, far = ((grad - want[1]).norm() / want[1].norm() for grad in (exact[1], fast[1]))
    assert near < 1e-5
    assert far < 1e-2
    if device.type == "cuda":  # the interpreter always multiplies in float32
        assert far > 10 * near


@pytest.mark.parametrize("batch", [256, 700])
def test_exact_products_stay_exact_over_many_rows(impl, device, batch):
    """The error of the mean gradient does not grow with the number of rows. The rows share a direction, so that sums
    have terms of one sign, whose truncation in tensor cores adds up."""
    if device.type == "cpu" and batch > 256 and not EVERY_CASE:
        pytest.skip("too slow in Triton's interpreter, whose products are float32's")
    views = (randn(2, batch, 16) + 3).to(device)
    got = run(info_nce_loss, views, 0.1, impl=impl)
    want = run(spec.info_nce_loss, views.double(), 0.1)
    assert (got[1] - want[1]).norm() <= 1e-6 * want[1].norm()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_a_temperature_tensor_that_is_no_temperature_gives_nan(impl, path, device, monkeypatch, value):
    temperature = torch.tensor(value, device=device)
    monkeypatch.setattr("selfsup_kernels.core.validate.readable", lambda t: False)
    assert info_nce_loss(randn(2, 9, 4).to(device), temperature=temperature, impl=impl).isnan()


def test_zero_rows_and_the_norm_floor(impl, path, device, dtype):
    views = randn(2, 20, 8, dtype=dtype)
    views[0, 3] = 0
    views[1, 3:9] *= 1e-3
    views = views.to(device)
    for eps in (1e-12, 1e-2):
        got = run(info_nce_loss, views, 0.1, eps=eps, impl=impl)
        eager = run(spec.info_nce_loss, views, torch.tensor(0.1, dtype=dtype), eps=eps)
        want = run(spec.info_nce_loss, views.double(), torch.tensor(0.1, dtype=dtype).double(), eps=eps)
        assert got[1].isfinite().all()
        some = torch.ones(2, 20, dtype=torch.bool)
        some[0, 3] = False  # a sum times 1 / eps, much larger than the rest
        assert_within("loss", got[0], want[0], eager[0])
        assert_within("grad", got[1][some], want[1][some], eager[1][some])


@pytest.mark.parametrize("labelled", [False, True])
def test_lists_strides_and_a_view_that_is_another(impl, path, device, labelled):
    x = randn(3, 35, 20).to(device)
    labels = random_labels(35, 6).to(device) if labelled else None
    want = run(info_nce_loss, x, 0.1, labels=labels, impl=impl)
    wide = torch.full((35, 40), math.nan, device=device)
    wide[:, ::2] = x[2]
    pieces = [x[0].clone(), x[1].T.contiguous().T, wide[:, ::2]]
    leaves = [p.detach().requires_grad_() for p in pieces]
    loss = info_nce_loss(leaves, temperature=0.1, labels=labels, impl=impl)
    grads = torch.stack(torch.autograd.grad(loss, leaves))
    assert_within("loss", loss.detach(), want[0].double())
    assert_within("grad", grads, want[1].double())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("size", [(2, 33, 20), (3, 2, 1), (2, 64, 32)], ids=str)
def test_nothing_is_read_or_written_past_an_end(impl, path, device, monkeypatch, size, labelled):
    """Every input and output ends at a guard page, and nothing past it is accessed; outputs start as NaN."""
    if device.type != "cpu":
        pytest.skip("pages that cannot be touched are the CPU's")

    def fenced(shape, dtype, device):
        return guarded(torch.full(shape if isinstance(shape, tuple) else (shape,), math.nan).to(dtype))

    monkeypatch.setattr(launcher, "empty", fenced)
    views = [guarded(v).requires_grad_() for v in randn(*size)]
    labels = guarded(random_labels(size[1], 5)) if labelled else None
    temperature = guarded(torch.tensor([0.1]))[0].requires_grad_()
    queue = guarded(randn(7, size[2], seed=2))
    loss = info_nce_loss(
        views, temperature=temperature, labels=labels, queue=queue, reduction="none", objective="supcon_in",
        impl=impl,
    )  # fmt: skip
    loss.backward(guarded(randn(*size[:2], seed=3)))
    assert loss.isfinite().all()
    assert all(v.grad.isfinite().all() for v in views)


@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(impl, device, labelled):
    views = list(randn(2, 20, 12).to(device).unbind(0))
    labels = random_labels(20, 5).to(device) if labelled else None
    queue = randn(7, 12, seed=1).to(device)
    call = info_nce_call(views, labels, queue, reduction="mean")
    arguments = (views, labels, None, queue, None, *call)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.overload("info_nce_forward", impl), arguments, test_utils=checks)
    loss, *saved = ops.overload("info_nce_forward", impl)(*arguments)
    torch.library.opcheck(
        ops.overload("info_nce_backward", impl),
        (torch.ones_like(loss), *saved, labels, *call, True, torch.float32),
        test_utils=checks,
    )


@pytest.mark.parametrize("seed", range(30))
def test_random_cases(impl, path, device, seed):
    """Random combinations of sizes, objectives, dtypes and options match the dense loss."""
    if device.type == "cpu" and seed >= 8 and not EVERY_CASE:
        pytest.skip("too slow in Triton's interpreter without SELFSUP_KERNELS_EVERY_CASE=1")
    chosen = random.Random(seed)
    dtype = chosen.choice(DTYPES)
    objective, num_views = chosen.choice(OBJECTIVES), chosen.choice([2, 2, 3, 5])
    batch, dim = chosen.choice([2, 3, 17, 64, 65, chosen.randrange(2, 90)]), chosen.choice([1, 7, 16, 33, 64, 100, 300])
    labelled = objective in LABEL_OBJECTIVES and chosen.random() < 0.4
    normalize = chosen.random() < 0.8
    size = 1.0 if normalize else dim**-0.5
    temperature = chosen.choice([0.5, 0.1, 0.05, 0.01]) if normalize else 1.0
    arguments = {
        "objective": objective,
        "normalize": normalize,
        "reduction": chosen.choice(["mean", "sum"]),
        "labels": random_labels(batch, chosen.choice([1, 3, batch]), seed).to(device) if labelled else None,
        "queue": (size * randn(chosen.randrange(1, 150), dim, dtype=dtype, seed=seed + 1)).to(device)
        if labelled or chosen.random() < 0.3
        else None,
        "core_view": chosen.choice([None, 1]) if not labelled else None,
    }
    views = (size * randn(num_views, batch, dim, dtype=dtype, seed=seed)).to(device)
    # The floor covers sums whose terms cancel but keep their rounding: over rows, and of rows of one feature (+-1).
    rows = num_views * batch if arguments["reduction"] == "sum" else 1
    nearest = views.double().abs().min().item() if dim == 1 else 1.0
    floor = 64 * torch.finfo(dtype if dim == 1 else torch.float32).eps * rows / temperature / nearest
    cancels = normalize and dtype != torch.float32  # for the temperature's gradient
    compare_info_nce(impl, views, temperature, floor=floor, cancels=cancels, **arguments)


def test_compiles_to_one_graph(impl, device):
    views = randn(2, 40, 20).to(device)

    def loss(x):
        return 2 * info_nce_loss(x.relu() + x, temperature=0.2, impl=impl)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = views.clone().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    for name, got, want in zip(("loss", "grad"), results[1], results[0], strict=True):
        assert_within(name, got, want.double())
