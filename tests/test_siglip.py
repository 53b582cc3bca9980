"""Check values and gradients of the sigmoid loss against the dense loss in float64, and how it may be called."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import IMPLS, LOW_PRECISION, assert_within, randn, random_labels
from hypothesis import given
from hypothesis import strategies as st
from test_memory_layout import peak_bytes
from test_properties import tensors

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.core import ops
from selfsup_kernels.siglip import reference

REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float64, torch.float32, *LOW_PRECISION]


def embeddings(batch, dim, dtype=torch.float64):
    """Return x and y, whose positives are nearer to each other than the negatives."""
    x, y = randn(batch, dim, dtype=dtype), randn(batch, dim, seed=1)
    return x, (y + x.to(y)).to(dtype)


def run(function, x, y, scale, bias, upstream=None, **arguments):
    """Return the loss and the gradients of x, y, scale and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, y, scale, bias)]
    loss = function(*leaves[:2], scale=leaves[2], bias=leaves[3], **arguments)
    weight = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, weight)


def compare(impl, x, y, scale=10.0, bias=-10.0, upstream=None, **arguments):
    """Check ``impl`` against the dense loss in float64, with the bounds of ``assert_within``."""
    dtype = x.dtype
    scale, bias = (torch.as_tensor(t, dtype=dtype) for t in (scale, bias))
    inputs = x, y, scale, bias
    got = run(sk.siglip_loss, *inputs, upstream, impl=impl, **arguments)
    truth = run(spec.siglip_loss, *(t.double() for t in inputs), upstream, **arguments)
    eager = [None] * 5 if dtype == torch.float64 else run(spec.siglip_loss, *inputs, upstream, **arguments)
    terms = cancellation(*(t.double() for t in inputs), upstream, **arguments)
    # In float64 nothing else measures the roundings of a few products.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    floors = [0.0, *(eps * float(t) for t in terms)]
    names = ("loss", "x", "y", "scale", "bias")
    for name, g, want, yardstick, floor in zip(names, got, truth, eager, floors, strict=True):
        assert g.dtype == dtype
        assert_within(name, g, want, yardstick, floor)


def cancellation(x, y, scale, bias, upstream, normalize=True, reduction="mean", **_):
    """Return bounds of the terms that the gradients of x, y, scale and bias are sums of: terms may cancel, and each is
    rounded. A row's gradient is projected, so near its maximum most of it cancels."""
    lengths = [h.norm(dim=-1).min() if normalize else 1.0 for h in (x, y)]
    if normalize:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    products = x @ y.T
    sign = 2 * torch.eye(len(x)) - 1
    slopes = torch.sigmoid(-sign * (scale * products + bias)) * (1 if upstream is None else upstream.abs()[:, None])
    slopes = slopes / (len(x) if reduction == "mean" else 1)
    # A score is rounded too, and what that changes in a slope is at most the slope times the score.
    slopes = slopes * (1 + (scale * products).abs() + bias.abs())
    of_rows = [scale * slopes.sum(d).norm() * h.norm(dim=-1).max() for d, h in ((1, y), (0, x))]
    return (
        *(g / length for g, length in zip(of_rows, lengths, strict=True)),
        (slopes * products.abs()).sum(),
        slopes.sum(),
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 3), (33, 130), (70, 7), (300, 20)], ids=str)
def test_values_and_gradients(impl, size, dtype, reduction, duplicates):
    x, y = embeddings(*size, dtype=dtype)
    ids = random_labels(size[0], max(1, size[0] // 3)) if duplicates else None
    upstream = randn(size[0], dtype=torch.float64, seed=2) if reduction == "none" else None
    compare(impl, x, y, 7.0, -3.0, upstream, reduction=reduction, duplicates=ids)


@pytest.mark.sanitize
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (600, 3), (9, 1030)], ids=str)
def test_unusual_sizes(impl, size):
    """Among them a batch of one sample, which has a positive pair only."""
    compare(impl, *embeddings(*size))
    compare(impl, *embeddings(*size), normalize=False, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -60.0), (1.0, 30.0), (200.0, 0.0), (20.0, -120.0)])
def test_near_saturation(impl, scale, bias, dtype):
    """Losses of a pair from 1e-50 to 200: the small ones are not lost, the large ones do not overflow."""
    x, y = embeddings(40, 16, dtype)
    compare(impl, x, y, scale, bias)
    compare(impl, x, x.clone(), scale, bias)


def test_small_losses_keep_their_relative_accuracy(impl):
    """log(1 + exp(-30)) is 1e-13: rounded as 1 + exp(-30) it would be 0 in float32."""
    x = torch.eye(6)
    loss = sk.siglip_loss(x, x, scale=60.0, bias=-30.0, reduction="none", impl=impl)
    want = spec.siglip_loss(x.double(), x.double(), scale=60.0, bias=-30.0, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_brute_force(impl, dtype):
    x, y = embeddings(5, 4, dtype)
    ids = [3, 1, 3, 2, 1]
    want = 0.0
    for i in range(5):
        for j in range(5):
            a, b = x[i].tolist(), y[j].tolist()
            cosine = sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            score = 4 * cosine - 1
            if i == j:
                want += math.log1p(math.exp(-score)) / 5
            elif ids[i] != ids[j]:
                want += math.log1p(math.exp(score)) / 5
    loss = sk.siglip_loss(x, y, scale=4, bias=-1, duplicates=torch.tensor(ids), impl=impl)
    assert abs(loss.item() - want) <= want * {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_duplicates_of_any_integer_dtype_and_stride(impl, kind):
    x, y = embeddings(12, 5)
    ids = torch.tensor([3, 0, 1, 3, 3, 2, 0, 1, 9, 8, 9, 2], dtype=kind)
    spread = torch.stack([ids, ids + 1], 1)[:, 0]
    want = sk.siglip_loss(x, y, duplicates=ids.long(), impl="reference")
    torch.testing.assert_close(sk.siglip_loss(x, y, duplicates=spread, impl=impl), want)
    assert not torch.isclose(want, sk.siglip_loss(x, y, impl=impl))
    # If all samples are the same, the positives are left.
    alone = sk.siglip_loss(x, y, duplicates=torch.zeros(12, dtype=kind), impl=impl, reduction="none")
    torch.testing.assert_close(alone, -F.logsigmoid(10 * F.cosine_similarity(x, y) - 10))


@given(data=st.data())
def test_random_calls(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, dim = data.draw(st.integers(1, 70)), data.draw(st.integers(4, 40))
    x, y = data.draw(tensors((batch, dim), dtype)), data.draw(tensors((batch, dim), dtype))
    scale, bias = data.draw(st.floats(0.1, 50)), data.draw(st.floats(-30, 30))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    ids = random_labels(batch, data.draw(st.integers(1, batch))) if data.draw(st.booleans()) else None
    upstream = randn(batch, dtype=torch.float64, seed=batch) if reduction == "none" else None
    for impl in ("reference", "cpu"):
        if impl in IMPLS:
            compare(impl, x, y, scale, bias, upstream, reduction=reduction, duplicates=ids)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(impl, normalize, reduction):
    def loss(x, y, scale, bias):
        ids = torch.tensor([0, 1, 0, 2, 1])
        return sk.siglip_loss(
            x, y, scale=scale, bias=bias, duplicates=ids, normalize=normalize, reduction=reduction, impl=impl
        )

    inputs = [*embeddings(5, 4), torch.tensor(3.0, dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)]
    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ["zero", "nan", "inf", "tiny"])
def test_special_rows(impl, row, dtype):
    """A row of zeros has a finite gradient; NaN and infinity give what the dense loss gives."""
    x, y = embeddings(6, 4, dtype)
    x[2] = {"zero": 0.0, "nan": math.nan, "inf": math.inf, "tiny": 1e-5}[row]
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    loss = sk.siglip_loss(*leaves, impl=impl)
    grads = torch.autograd.grad(loss, leaves)
    finite = row in ("zero", "tiny")
    assert loss.isfinite() == finite
    assert all(g.isfinite().all() == finite for g in grads)
    if row == "tiny":
        compare(impl, x, y)


def test_infinite_scores(impl):
    """Rows that are not normalised may have infinite products: a negative pair of that score is infinitely bad."""
    x = torch.tensor([[1e30, 0], [0, 1.0]])
    y = torch.tensor([[-1e30, 1], [1e30, 1.0]])
    loss = sk.siglip_loss(x, y, normalize=False, reduction="none", impl=impl)
    want = spec.siglip_loss(x, y, normalize=False, reduction="none")
    assert torch.equal(loss.isinf(), want.isinf())
    assert loss[0].isinf()
    torch.testing.assert_close(loss[1], want[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed(impl, needed):
    """A locked tower's embeddings need none (LiT); then the loss does not make it."""
    x, y = embeddings(80, 9)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    full = run(sk.siglip_loss, x, y, scale, torch.tensor(-1.0, dtype=torch.float64), impl=impl)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, y), needed, strict=True)]
    sk.siglip_loss(*leaves, scale=scale, bias=-1.0, impl=impl).backward()
    for leaf, need, want in zip(leaves, needed, full[1:3], strict=True):
        assert (leaf.grad is None) != need
        if need:
            torch.testing.assert_close(leaf.grad, want)
    torch.testing.assert_close(scale.grad, full[3])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_grad_is_the_gradient_of_the_loss(impl, dtype, reduction):
    x, y = embeddings(33, 9, dtype)
    scale, bias = torch.tensor([5.0]), torch.tensor(-2.0)
    want = run(sk.siglip_loss, x, y, scale, bias, reduction=reduction, impl=impl)
    x.requires_grad_()
    got = sk.siglip_value_and_grad(x, y, scale=scale, bias=bias, reduction=reduction, impl=impl)
    assert not any(t.requires_grad for t in got)
    assert [t.dtype for t in got] == [dtype] * 3 + [ops.accumulation_dtype(dtype)] * 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape).to(a.dtype))
    numbers = sk.siglip_value_and_grad(x, y, scale=5.0, bias=-2.0, reduction=reduction, impl=impl)
    for a, b in zip(numbers, got, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"^reduction: expected one of mean, sum, got"):
        sk.siglip_value_and_grad(x, y, reduction="none")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_many_rows_in_half_precision(impl, dtype):
    """The gradient of a mean over many rows reaches below float16's smallest number before the scaler multiplies."""
    x, y = embeddings(600, 8, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    (sk.siglip_loss(*leaves, impl=impl).float() * 2**12).backward()
    wide = [t.double().requires_grad_() for t in (x, y)]
    (spec.siglip_loss(*wide) * 2**12).backward()
    for got, want in zip(leaves, wide, strict=True):
        assert_within("gradient", got.grad, want.grad)


def test_the_graph_may_be_kept(impl):
    """What the forward saved is multiplied, never changed."""
    leaves = [t.requires_grad_() for t in embeddings(20, 6)]
    loss = sk.siglip_loss(*leaves, impl=impl)
    once = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    once[0].zero_()
    again = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    single = torch.autograd.grad(loss, leaves)
    for a, b in zip(again, single, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(impl, reduction):
    x, y = (t.requires_grad_() for t in embeddings(5, 4))
    loss = sk.siglip_loss(x, y, reduction=reduction, impl=impl).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_torch_func(impl):
    x, y = embeddings(6, 4)

    def loss(x, scale):
        return sk.siglip_loss(x, y, scale=scale, impl=impl)

    scale = torch.tensor(4.0, dtype=torch.float64)
    got = torch.func.grad(loss, (0, 1))(x, scale)
    leaves = [t.clone().requires_grad_() for t in (x, scale)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(got, want)
    batched = torch.func.vmap(torch.func.grad(loss), (0, None))(torch.stack([x, 2 * x]), scale)
    torch.testing.assert_close(batched, torch.stack([want[0], want[0] / 2]))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast(impl, dtype):
    x, y = embeddings(20, 8, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sk.siglip_loss(x, y, impl=impl)
        mixed = sk.siglip_loss(x, y.float(), impl=impl)
    assert loss.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(loss, mixed, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), spec.siglip_loss(x.double(), y.double()), rtol=1e-5, atol=0)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_in_one_graph(impl, reduction):
    torch._dynamo.reset()

    def loss(x, y, log_scale, bias):
        ids = torch.arange(len(x)) // 2
        return sk.siglip_loss(
            x, y, scale=log_scale.exp(), bias=bias, duplicates=ids, reduction=reduction, impl=impl
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (12, 20):
        inputs = [*embeddings(batch, 8, torch.float32), torch.tensor(1.0), torch.tensor([-2.0])]
        results = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs]
            value = function(*leaves)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_traced_graph_has_gradients(impl, reduction):
    """Even if the inputs of the trace needed none."""
    x, y = embeddings(5, 4)
    traced = torch.jit.trace(
        lambda x, y: sk.siglip_loss(x, y, reduction=reduction, impl=impl).sum(), (x, y), check_trace=False
    )
    x, y = (t.requires_grad_() for t in embeddings(7, 4))
    got = torch.autograd.grad(traced(x, y), (x, y))
    want = torch.autograd.grad(sk.siglip_loss(x, y, reduction=reduction, impl=impl).sum(), (x, y))
    # The trace holds the number of rows in the mean.
    torch.testing.assert_close(got, want)


def test_same_bits_with_any_number_of_threads(impl):
    if impl == "reference":
        return  # torch's own product determines the order of summation
    x, y = embeddings(700, 33, torch.float32)
    ids, upstream = random_labels(700, 300), randn(700, seed=3)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        scalars = torch.tensor(10.0), torch.tensor(-10.0)
        results.append(run(sk.siglip_loss, x, y, *scalars, upstream, duplicates=ids, reduction="none", impl=impl))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("duplicates", [False, True])
def test_memory_is_linear_in_the_rows(impl, duplicates, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 2**18)
    batch, dim = (2048 if impl == "reference" else 8192), 64
    x, y = (t.requires_grad_() for t in embeddings(batch, dim, torch.float32))
    ids = random_labels(batch, batch // 2) if duplicates else None
    embedded = 2 * 4 * batch * dim
    peak = peak_bytes(lambda: sk.siglip_loss(x, y, duplicates=ids, impl=impl).backward())
    # Unit rows, gradients, and results while the gradients are kept; the tiles of all threads, or a block of scores.
    assert embedded < peak < 3 * embedded + 2**23 < 4 * batch * batch * (0.5 if impl == "cpu" else 1)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["plain", "duplicates", "none", "first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(impl, form, dtype):
    x, y = embeddings(5, 4, dtype)
    x, first = (x[1:4], 1) if form == "first" else (x, 0)
    ids = torch.tensor([1, 2, 1, 0, 2]) if form == "duplicates" else None
    reduction = ops.REDUCTIONS.index("none" if form == "none" else "mean")
    arguments = (x, y, ids, torch.tensor(2.0), None)
    call = (len(x), len(y), 4, first, True, reduction, 1e-12, 0.0, -1.0)
    upstream = torch.ones(len(x), dtype=ops.accumulation_dtype(dtype)) if form == "none" else None
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.overload("siglip_value", impl), (*arguments, *call), test_utils=utils)
    for needs in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(
            ops.overload("siglip_value_and_grad", impl), (*arguments, upstream, *call, *needs), test_utils=utils
        )


def test_the_op_refuses_tensors_that_do_not_fit_its_sizes():
    if "cpu" not in IMPLS:
        return
    op = ops.overload("siglip_value", "cpu")
    empty, call = torch.zeros(2, 0), (1, 1e-12, 10.0, -10.0)
    for x, sizes in ((empty, (2, 2, 0, 0)), (X, (4, 4, 2, 0)), (X, (4, 4, 3, 1)), (X, (4, 4, 3, -1))):
        with pytest.raises(RuntimeError, match="expected tensors of the sizes of the call"):
            op(x, x, None, None, None, *sizes, True, *call)


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"^x: expected a \(B, D\) tensor, got list"),
        ({"x": X[0]}, ValueError, r"^x: expected a \(B, D\) tensor, got shape \(3,\)"),
        ({"y": X[:3]}, ValueError, r"^y: expected the shape of x, \(4, 3\), got \(3, 3\)"),
        ({"y": X[:1]}, ValueError, "^y: expected the shape of x"),
        ({"x": X[:0], "y": X[:0]}, ValueError, "^x: expected a non-empty batch"),
        ({"x": X[:, :0], "y": X[:, :0]}, ValueError, "^x: expected at least one feature"),
        ({"x": X.long(), "y": X.long()}, TypeError, "^x: expected float64"),
        ({"y": X.double()}, TypeError, "^y: expected the dtype of x, torch.float32, got torch.float64"),
        ({"y": X.to("meta")}, ValueError, "^y: expected the device of x, cpu, got meta"),
        ({"scale": 0.0}, ValueError, "^scale: expected a finite number > 0, got 0"),
        ({"scale": math.nan}, ValueError, "^scale: expected a finite number > 0"),
        ({"scale": torch.tensor(-1.0)}, ValueError, "^scale: expected a finite number > 0, got -1"),
        ({"scale": torch.ones(2)}, ValueError, "^scale: expected a number or a tensor of one element"),
        ({"scale": "10"}, TypeError, "^scale: expected a number, got str"),
        ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "^scale: expected the device of x, cpu, got meta"),
        ({"bias": math.inf}, ValueError, "^bias: expected a finite number, got inf"),
        ({"bias": torch.tensor(math.nan)}, ValueError, "^bias: expected a finite number, got nan"),
        ({"bias": None}, TypeError, "^bias: expected a number, got NoneType"),
        ({"duplicates": [0, 1, 2, 3]}, TypeError, "^duplicates: expected an integer tensor, got list"),
        ({"duplicates": torch.zeros(3, dtype=torch.int64)}, ValueError, r"^duplicates: expected shape \(4,\)"),
        ({"duplicates": torch.zeros(4)}, TypeError, "^duplicates: expected a tensor of int64"),
        ({"eps": 0}, ValueError, "^eps: expected a finite number > 0"),
        ({"reduction": "avg"}, ValueError, "^reduction: expected one of none, mean, sum, got 'avg'"),
        ({"impl": "gpu"}, ValueError, "^impl: expected one of"),
        ({"impl": "cuda"}, RuntimeError, "^impl='cuda' has no siglip"),
        ({"group": 3}, TypeError, "^group: expected"),
    ],
)
def test_bad_input(change, error, message):
    for function in (sk.siglip_loss, sk.siglip_value_and_grad):
        if function is sk.siglip_value_and_grad and change.get("reduction"):
            continue
        with pytest.raises(error, match=message):
            function(**({"x": X, "y": X} | change))


def test_module():
    x, y = (t.requires_grad_() for t in embeddings(7, 5, torch.float32))
    module = sk.SigLIPLoss(8.0, -4.0, eps=1e-6, reduction="sum")
    loss = module(x, y, duplicates=torch.arange(7) // 2)
    want = sk.siglip_loss(x, y, scale=8.0, bias=-4.0, duplicates=torch.arange(7) // 2, reduction="sum")
    torch.testing.assert_close(loss, want)
    loss.backward()
    full = sk.siglip_value_and_grad(x, y, scale=8.0, bias=-4.0, duplicates=torch.arange(7) // 2, reduction="sum")
    torch.testing.assert_close(module.logit_scale.grad, 8 * full[3].reshape(1))
    torch.testing.assert_close(module.logit_bias.grad, full[4].reshape(1))
    other = sk.SigLIPLoss()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close((other.scale.item(), other.bias.item()), (8.0, -4.0))
    assert repr(other) == "SigLIPLoss(scale=8, bias=-4, learnable=True, group=None)"
    other.load_state_dict(
        {"logit_scale": torch.tensor(0.0), "logit_bias": torch.tensor(1.0)}
    )  # as in open_clip's models
    assert (other.scale.item(), other.bias.item()) == (1, 1)
    fixed = sk.SigLIPLoss(8.0, -4.0, learnable=False, reduction="sum")
    assert not list(fixed.parameters())
    torch.testing.assert_close(fixed(x, y), sk.siglip_loss(x, y, scale=8.0, bias=-4.0, reduction="sum"))
    assert repr(fixed) == "SigLIPLoss(scale=8, bias=-4, learnable=False, reduction='sum', group=None)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale"),
        ({"bias": math.nan}, ValueError, "bias"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"impl": "gpu"}, ValueError, "impl"),
        ({"eps": -1}, ValueError, "eps"),
        ({"group": "all"}, TypeError, "group"),
    ],
)
def test_module_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^{message}: expected"):
        sk.SigLIPLoss(**arguments)
