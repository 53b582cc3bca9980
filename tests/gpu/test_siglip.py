"""Compare the GPU kernels of the sigmoid loss with the dense loss in float64, at sizes that no tile divides."""

import math

import pytest
import tiles
import torch
from guard import guarded
from helpers import assert_within, randn, random_labels

from selfsup_kernels import siglip_loss, siglip_value_and_grad, spec
from selfsup_kernels.core import ops
from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.siglip.call import Call
from selfsup_kernels.tiles import configs, launcher, waves

IMPL = "triton"
NAMES = ("loss", "grad of x", "grad of y", "grad of scale", "grad of bias")


@pytest.fixture
def small(monkeypatch):
    """Tiles so small, 32 x 32 pairs, that a few rows fill many."""
    monkeypatch.setattr(configs, "_lookup", tiles.small("waves"))


@pytest.fixture
def waves_of_256(monkeypatch):
    """Waves of 256 x 256 pairs, the smallest."""
    monkeypatch.setattr(waves, "WORKSPACE_BYTES", 1)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names, launch = [], launcher.launch
    monkeypatch.setattr(launcher, "launch", lambda kernel, *a, **o: (names.append(kernel), launch(kernel, *a, **o))[1])
    return names


def pairs(batch, dim, dtype=torch.float32, device="cpu", seed=0):
    """Return x and y that have something in common: scores of positives are larger."""
    x = randn(batch, dim, dtype=torch.float64, seed=seed)
    y = x + randn(batch, dim, dtype=torch.float64, seed=seed + 1)
    return x.to(dtype).to(device), y.to(dtype).to(device)


def run(function, x, y, scale, bias, upstream=None, **arguments):
    """Return the loss and the gradients of x, y, scale and bias, detached; ``upstream`` weights the loss' elements."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale.to(x.dtype), bias.to(x.dtype))]
    loss = function(*leaves[:2], scale=leaves[2], bias=leaves[3], **arguments)
    weight = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, weight)


def compare(impl, x, y, scale=10.0, bias=-10.0, upstream=None, floor=0.0, **arguments):
    """Check the loss and all gradients against the dense loss in float64. Allowed is twice the error of the dense loss
    in the dtype of the rows, or a few roundings.

    The gradients of scale and bias are small sums of large terms: they may be wrong by a rounding of every term.
    """
    scale, bias = torch.tensor(scale, dtype=x.dtype), torch.tensor(bias, dtype=x.dtype)
    given = x, y, scale, bias, upstream
    got = run(siglip_loss, *given, impl=impl, **arguments)
    eager = run(spec.siglip_loss, *given, **arguments)
    wide = (None if t is None else t.double() for t in given)
    want = run(spec.siglip_loss, *wide, **arguments)
    terms = absolute_gradient(x, y, scale, bias, upstream, **arguments) * torch.finfo(x.dtype).eps
    floors = floor, floor, floor, terms + floor, terms + floor
    for name, ours, truth, theirs, least in zip(NAMES, got, want, eager, floors, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert_within(name, ours, truth, theirs, least)


def absolute_gradient(x, y, scale, bias, upstream, duplicates=None, normalize=True, eps=1e-12, reduction="mean"):
    """Return the sum of |G|, or of |G <x, y>| if that is larger."""
    x, y = x.double(), y.double()
    if normalize:
        x, y = (torch.nn.functional.normalize(h, dim=-1, eps=eps) for h in (x, y))
    products = x @ y.T
    scores = scale.double().to(x.device) * products + bias.double().to(x.device)
    positive = torch.eye(len(x), dtype=torch.bool, device=x.device)
    g = torch.sigmoid(torch.where(positive, -scores, scores))
    g = g / (len(x) if reduction == "mean" else 1)
    if upstream is not None:
        g = g * upstream.double().abs().reshape(-1, 1)
    return max(g.sum().item(), (g * products).abs().sum().item())


@pytest.mark.parametrize(("batch", "dim"), [(1, 33), (2, 64), (37, 300), (65, 16), (64, 128), (150, 130)], ids=str)
def test_sizes(impl, device, dtype, batch, dim):
    compare(impl, *pairs(batch, dim, dtype, device))


def test_rows_of_a_thousand_numbers(impl, device):
    compare(impl, *pairs(17, 1030, device=device))


def test_rows_of_one_number(impl, device, dtype):
    """Rows of one number are +-1 after normalisation, and their gradient is zero up to rounding."""
    x, y = pairs(20, 1, dtype, device)
    smallest = min(x.double().abs().min(), y.double().abs().min()).item()
    compare(impl, x, y, floor=16 * torch.finfo(dtype).eps * 10 / smallest)


@pytest.mark.parametrize(
    ("reduction", "duplicates", "normalize"),
    [
        ("none", None, True),
        ("none", 12, False),
        ("mean", None, False),
        ("mean", 1, True),
        ("sum", None, True),
        ("sum", 12, True),
    ],
)
def test_reductions_and_duplicates(impl, device, small, dtype, reduction, duplicates, normalize):
    x, y = pairs(45, 20, dtype, device)
    arguments = {"scale": 10.0, "bias": -10.0} if normalize else {"scale": 0.25, "bias": -2.0}
    if duplicates is not None:
        arguments["duplicates"] = random_labels(45, duplicates).to(device)
    upstream = randn(45, seed=5).to(device) if reduction == "none" else torch.tensor(-(2.0**-19), device=device)
    compare(impl, x, y, upstream=upstream, reduction=reduction, normalize=normalize, **arguments)


@pytest.mark.parametrize("duplicates", [False, True])
def test_several_waves(impl, device, waves_of_256, dtype, launches, duplicates):
    """The gradients and sums of 2 x 2 waves, with diagonal and last tiles in some of them, add up."""
    x, y = pairs(270, 40, dtype, device)
    ids = random_labels(270, 40).to(device) if duplicates else None
    compare(impl, x, y, upstream=randn(270, seed=5).to(device), reduction="none", duplicates=ids)
    # Without upstream gradients the forward has one pass, with them one more, which makes both products.
    assert launches.count("siglip_wave_kernel") == 2 * 4
    assert launches.count("product_kernel") == 2 * 4


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -100.0), (100.0, 30.0), (1.0, 0.0), (0.01, -30.0)])
@pytest.mark.parametrize("rows", ["random", "identical", "opposed"])
def test_saturated_pairs(impl, device, dtype, scale, bias, rows):
    x, y = pairs(33, 64, dtype, device)
    if rows == "identical":
        x, y = x[:1].expand(33, 64), x[:1].expand(33, 64)
    elif rows == "opposed":
        y = -x
    # The rows are of few bits, and so are their scores.
    steep = scale * torch.finfo(dtype).eps
    weight = absolute_gradient(x, y, torch.tensor(scale), torch.tensor(bias), None)
    norm = min(x.double().norm(dim=1).min(), y.double().norm(dim=1).min()).item()
    floor = steep * weight * max(1.0, scale / norm) if dtype != torch.float32 else 4 * steep * weight * max(1, scale)
    compare(impl, x, y, scale, bias, floor=floor)


def test_small_losses_keep_their_digits(impl, device):
    """Losses of 1e-13 are as accurate as others: no term is rounded to the spacing of 1."""
    x, y = pairs(20, 64, device=device)
    for scale, bias in ((1.0, -30.0), (10.0, -40.0)):
        ids = torch.zeros(20, dtype=torch.int64, device=device)
        ids[10:] = 1  # pairs of the two halves count
        arguments = {"bias": bias, "duplicates": ids, "reduction": "none"}
        got = siglip_loss(x, y, scale=scale, impl=impl, **arguments).double()
        want = spec.siglip_loss(x.double(), y.double(), scale=scale, **arguments)
        assert ((got - want).abs() <= 2e-6 * want).all()
        # Without the positives, which are large.
        negatives = torch.stack([x[0], x[0]]), torch.stack([x[0], -x[0]])
        got = siglip_loss(*negatives, scale=40.0, bias=0.0, reduction="none", impl=impl)[0].double()
        want = spec.siglip_loss(*(n.double() for n in negatives), scale=40.0, bias=0.0, reduction="none")[0]
        assert want < 1e-17
        assert abs(got - want) <= 1e-4 * want


@pytest.mark.parametrize("form", ["numbers", "scale", "bias", "one element", "other dtype"])
def test_numbers_and_tensors(impl, device, form):
    """Scale and bias may be numbers or tensors of one element; gradients exist for those that ask for them."""
    x, y = pairs(40, 20, device=device)
    want = run(spec.siglip_loss, x.double(), y.double(), torch.tensor(7.0), torch.tensor(-3.0))
    scale, bias = 7.0, -3.0
    if form != "numbers":
        if form != "bias":
            scale = torch.tensor(7.0, device=device, requires_grad=True)
        if form != "scale":
            bias = torch.tensor(-3.0, device=device, requires_grad=True)
    if form == "one element":  # which begins at an address of no alignment
        scale = torch.tensor([0.0, 7.0], device=device)[1:].requires_grad_()
        bias = torch.tensor([0.0, 0.0, 0.0, -3.0], device=device)[3:].requires_grad_()
    if form == "other dtype":
        scale, bias = (t.detach().double().requires_grad_() for t in (scale, bias))
    x.requires_grad_()
    loss = siglip_loss(x, y, scale=scale, bias=bias, impl=impl)
    loss.backward()
    assert_within("loss", loss.detach(), want[0])
    assert_within("grad of x", x.grad, want[1])
    for name, tensor, truth in ((NAMES[3], scale, want[3]), (NAMES[4], bias, want[4])):
        if isinstance(tensor, torch.Tensor):
            assert tensor.grad.dtype == tensor.dtype
            assert_within(name, tensor.grad.float().reshape(()), truth)


def test_values_without_gradients(impl, device, dtype, launches):
    for batch, reduction in ((150, "none"), (40, "mean"), (40, "sum")):
        x, y = pairs(batch, 20, dtype, device)
        arguments = {"scale": 5.0, "bias": -4.0, "reduction": reduction}
        with torch.no_grad():
            got = siglip_loss(x, y, impl=impl, **arguments)
        want = spec.siglip_loss(x.double(), y.double(), **arguments)
        assert_within("loss", got, want, spec.siglip_loss(x, y, **arguments))
    assert "siglip_wave_kernel" in launches
    assert "product_kernel" not in launches


def test_value_and_grad(impl, device, dtype):
    x, y = pairs(50, 20, dtype, device)
    got = siglip_value_and_grad(x, y, scale=5.0, bias=-4.0, impl=impl)
    numbers = torch.tensor(5.0), torch.tensor(-4.0)
    want = run(spec.siglip_loss, x.double(), y.double(), *numbers)
    eager = run(spec.siglip_loss, x, y, *numbers)
    terms = absolute_gradient(x, y, *numbers, None) * torch.finfo(dtype).eps
    for name, ours, truth, theirs in zip(NAMES, got, want, eager, strict=True):
        assert_within(name, ours, truth, theirs, terms if "scale" in name or "bias" in name else 0.0)


def part(x, y, first, count, reduction="none", normalize=True):
    return Call(count, len(y), x.shape[1], first, normalize, REDUCTIONS.index(reduction), 1e-12, 7.0, -3.0)


@pytest.mark.parametrize(("first", "count"), [(0, 20), (64, 64), (199, 1), (256, 30)])
@pytest.mark.parametrize("duplicates", [False, True])
def test_a_part_of_the_rows(impl, device, waves_of_256, first, count, duplicates):
    """A process has the pairs of its rows of x with all rows of y: those of the whole loss with weights of 0 for the
    rows of others."""
    x, y = pairs(max(200, first + count + 3), 40, device=device)
    ids = random_labels(len(y), 12).to(device) if duplicates else None
    own = slice(first, first + count)
    upstream = torch.zeros(len(y), device=device)
    upstream[own] = randn(count, seed=3).to(device)
    scalars = torch.tensor(7.0), torch.tensor(-3.0)
    wide = run(spec.siglip_loss, x.double(), y.double(), *scalars, upstream.double(), duplicates=ids, reduction="none")
    call = part(x, y, first, count)
    loss, grad_x, grad_y, grad_scalars = ops.overload("siglip_value_and_grad", impl)(
        x[own], y, ids, None, None, upstream[own], *call, True, True
    )
    assert_within("loss", loss, wide[0][own])
    assert_within("grad of x", grad_x, wide[1][own])
    assert_within("grad of y", grad_y, wide[2])
    terms = upstream.abs().sum().item() * 1e-6
    assert_within("grad of scalars", grad_scalars.float().cpu(), torch.stack(wide[3:]), floor=terms)
    value = ops.overload("siglip_value", impl)(x[own], y, ids, None, None, *call)
    assert_within("value", value, wide[0][own])


@pytest.mark.parametrize(("need_x", "need_y"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dim", [40, 64])
def test_only_needed_gradients_are_made(impl, device, small, launches, need_x, need_y, dim):
    x, y = pairs(60, dim, device=device)
    call = part(x, y, 0, 60, "mean")
    op = ops.overload("siglip_value_and_grad", impl)
    want = op(x, y, None, None, None, None, *call, True, True)
    launches.clear()
    got = op(x, y, None, None, None, None, *call, need_x, need_y)
    assert launches.count("product_kernel") == need_x + need_y
    assert launches.count("siglip_finish_kernel") == 1 + need_y
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[3], want[3])
    for gradient, whole, needed in zip(got[1:3], want[1:3], (need_x, need_y), strict=True):
        assert torch.equal(gradient, whole if needed else whole[:0])


def test_upstream_gradient_may_be_expanded_zero_or_small(impl, device, small, dtype):
    x, y = pairs(40, 20, dtype, device)
    few = torch.zeros(40, device=device)
    few[3] = 1e-30 if dtype != torch.float16 else 1e-6
    scalars = torch.tensor(7.0), torch.tensor(-3.0)
    for upstream in (torch.tensor(0.5, device=device).expand(40), few, few * 0, randn(80, seed=3).to(device)[::2]):
        given = *scalars, upstream
        got = run(siglip_loss, x, y, *given, reduction="none", impl=impl)
        eager = run(spec.siglip_loss, x, y, *given, reduction="none")
        want = run(spec.siglip_loss, x.double(), y.double(), *given, reduction="none")
        terms = upstream.abs().sum().item() * 40 * torch.finfo(dtype).eps
        for name, ours, truth, theirs, floor in zip(NAMES, got, want, eager, (0, 0, 0, terms, terms), strict=True):
            assert_within(name, ours, truth, theirs, floor)


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_give_what_the_dense_loss_gives(impl, device, small, value, normalize, side):
    x, y = pairs(40, 8, device=device)
    x, y = 0.3 * x, 0.3 * y
    (x if side == "x" else y)[5, 2] = value
    scalars = torch.tensor(5.0), torch.tensor(-2.0)
    got = run(siglip_loss, x, y, *scalars, normalize=normalize, reduction="none", impl=impl)
    want = run(spec.siglip_loss, x, y, *scalars, normalize=normalize, reduction="none")
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[0].isinf(), want[0].isinf())
    assert not got[0].isfinite().all()
    for name, ours, truth in zip(NAMES[1:], got[1:], want[1:], strict=True):
        # No plausible number takes the place of NaN. Inf * 0 is NaN in one implementation and 0 in another.
        assert not (ours.isfinite() & truth.isnan()).any(), name
        if value != value:
            assert torch.equal(ours.isnan(), truth.isnan()), name


@pytest.mark.parametrize("which", ["scale", "bias"])
def test_scale_and_bias_that_are_nan_give_nan(impl, device, which):
    x, y = pairs(9, 4, device=device)
    numbers = {"scale": torch.tensor(5.0, device=device), "bias": torch.tensor(-2.0, device=device)}
    numbers[which].fill_(math.nan)
    call = part(x, y, 0, 9)
    loss, grad_x, grad_y, grad_scalars = ops.overload("siglip_value_and_grad", impl)(
        x, y, None, *numbers.values(), None, *call, True, True
    )
    assert all(t.isnan().all() for t in (loss, grad_x, grad_y, grad_scalars))


def test_zero_rows_and_the_norm_floor(impl, device, small, dtype):
    x, y = pairs(20, 8, dtype, device)
    x[3], y[7] = 0, 0
    x[5:9] *= 1e-3
    scalars = torch.tensor(5.0), torch.tensor(-2.0)
    for eps in (1e-12, 1e-2):
        got = run(siglip_loss, x, y, *scalars, eps=eps, impl=impl)
        eager = run(spec.siglip_loss, x, y, *scalars, eps=eps)
        want = run(spec.siglip_loss, x.double(), y.double(), *scalars, eps=eps)
        assert all(t.isfinite().all() for t in got)
        some_x, some_y = torch.arange(20, device=device) != 3, torch.arange(20, device=device) != 7
        assert_within("loss", got[0], want[0], eager[0])
        assert_within("grad of x", got[1][some_x], want[1][some_x], eager[1][some_x])
        assert_within("grad of y", got[2][some_y], want[2][some_y], eager[2][some_y])
        if dtype == torch.float32:  # these are a sum times 1 / eps
            assert_within("grad of x", got[1][3], want[1][3], eager[1][3])
            assert_within("grad of y", got[2][7], want[2][7], eager[2][7])


def test_strides_and_one_tensor_as_both_sides(impl, device):
    x, y = pairs(35, 20, device=device)
    scalars = torch.tensor(7.0), torch.tensor(-3.0)
    want = run(spec.siglip_loss, x.double(), y.double(), *scalars)
    wide = torch.full((35, 40), math.nan, device=device)
    wide[:, :20] = x  # rows at a distance, then numbers at a distance
    apart = torch.full((35, 40), math.nan, device=device)
    apart[:, ::2] = y
    for left, right in ((wide[:, :20], apart[:, ::2]), (x.T.contiguous().T, y)):
        leaves = [t.detach().requires_grad_() for t in (left, right)]
        loss = siglip_loss(*leaves, scale=7.0, bias=-3.0, impl=impl)
        grads = torch.autograd.grad(loss, leaves)
        assert_within("loss", loss.detach(), want[0])
        for name, got, truth in zip(NAMES[1:], grads, want[1:], strict=False):
            assert_within(name, got, truth)
    both = x.clone().requires_grad_()
    siglip_loss(both, both, scale=7.0, bias=-3.0, impl=impl).backward()
    truth = run(spec.siglip_loss, x.double(), x.double(), *scalars)
    assert_within("grad of both", both.grad, truth[1] + truth[2])


@pytest.mark.parametrize("size", [(33, 20), (2, 1), (64, 64)], ids=str)
@pytest.mark.parametrize("duplicates", [False, True])
def test_nothing_is_read_or_written_past_an_end(impl, device, small, monkeypatch, size, duplicates):
    """Every input and output ends at a guard page, and nothing past it is accessed; outputs start as NaN."""
    if device.type != "cpu":
        pytest.skip("pages that cannot be touched are the CPU's")

    def fenced(shape, dtype, device):
        return guarded(torch.full(shape if isinstance(shape, tuple) else (shape,), math.nan).to(dtype))

    monkeypatch.setattr(launcher, "empty", fenced)
    x, y = (guarded(t).requires_grad_() for t in pairs(*size))
    scale, bias = (guarded(torch.tensor([v]))[0].requires_grad_() for v in (7.0, -3.0))
    ids = guarded(random_labels(size[0], 5)) if duplicates else None
    loss = siglip_loss(x, y, scale=scale, bias=bias, duplicates=ids, reduction="none", impl=impl)
    loss.backward(guarded(randn(size[0], seed=3)))
    assert loss.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, y, scale, bias))


@pytest.mark.parametrize("descriptor", [False, True])
def test_descriptors_and_pointers_load_the_same(impl, device, small, monkeypatch, descriptor):
    inner = configs._lookup
    # Tiles that are not square show operands that are swapped.
    shapes = {"wave": {"block_m": 64, "block_n": 32}, "product": {"block_m": 16, "block_n": 64}}
    monkeypatch.setattr(
        configs, "_lookup", lambda kernel, *key: inner(kernel, *key)._replace(descriptor=descriptor, **shapes[kernel])
    )
    compare(impl, *pairs(90, 70, device=device))


@pytest.mark.parametrize("wrong", [{"block_m": 16}, {"block_n": 16}])
def test_a_table_whose_tiles_do_not_fit_is_refused(impl, device, monkeypatch, wrong):
    fits = tiles.small("waves")("wave", 90, "half", "long")
    x, y = pairs(20, 20, device=device)
    entries = configs.override({"wave": fits._replace(**wrong), "product": fits})
    with entries, pytest.raises(ValueError, match="whole pieces of the product"):
        siglip_loss(x, y, impl=impl)


def test_too_many_rows_are_refused(impl, device):
    """The places of three sums for each row are 32-bit numbers."""
    rows = torch.zeros(1, 1, device=device).expand(2**30, 1)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        siglip_loss(rows, rows, impl=impl)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(impl, device, reduction):
    x, y = pairs(20, 12, device=device)
    ids = random_labels(30, 5).to(device)
    y = torch.cat([y, y[:10]])
    scale = torch.tensor(7.0, device=device)
    call = part(x, y, 4, 20, reduction)
    upstream = randn(20, seed=3).to(device) if reduction == "none" else None
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.overload("siglip_value", impl), (x, y, ids, scale, None, *call), test_utils=checks)
    for needed in ((True, False), (False, True)):
        torch.library.opcheck(
            ops.overload("siglip_value_and_grad", impl),
            (x, y, ids, scale, None, upstream, *call, *needed),
            test_utils=checks,
        )


def test_two_calls_give_the_same_bits(impl, device):
    x, y = pairs(130, 64, torch.bfloat16, device)
    first, second = (run(siglip_loss, x, y, torch.tensor(7.0), torch.tensor(-3.0), impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
