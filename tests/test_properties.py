"""Compare each op with the dense equations in 200 random cases of shapes, strides, offsets, dtypes and options."""

import math

import hypothesis.strategies as st
import pytest
import torch
from helpers import IMPLS, assert_within, randn, run
from hypothesis import given, settings

from selfsup_kernels import byol_loss, info_nce_loss, spec
from selfsup_kernels.functional import ema_update_
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SMALL = st.integers(1, 40)
SEEDS = st.integers(0, 10**6)


@st.composite
def tensors(draw, shape, dtype):
    """Draw a normal tensor inside a larger tensor of NaN, with its dimensions in any order in memory."""
    order = draw(st.permutations(range(len(shape))))
    step = [draw(st.integers(1, 3)) for _ in shape]
    start = [draw(st.integers(0, 3)) for _ in shape]
    size = [a + n * s + draw(st.integers(0, 2)) for a, n, s in zip(start, shape, step, strict=True)]
    big = torch.full([size[d] for d in order], torch.nan, dtype=dtype)
    place = big.permute([order.index(d) for d in range(len(shape))])
    place = place[tuple(slice(a, a + n * s, s) for a, n, s in zip(start, shape, step, strict=True))]
    place.copy_(randn(*shape, seed=draw(SEEDS)))
    return place


@st.composite
def losses(draw):
    objective = draw(st.sampled_from(OBJECTIVES))
    num_views, batch, dim = draw(st.integers(2, 5)), draw(st.integers(2, 40)), draw(SMALL)
    dtype = draw(DTYPES)
    arguments = {"objective": objective, "reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    arguments["normalize"] = draw(st.booleans()) if dim < 8 else True
    columns = draw(st.sampled_from(["plain", "queue", "logq"]))
    if columns == "queue":
        arguments["queue"] = draw(tensors((draw(SMALL), dim), dtype))
    elif columns == "logq":
        shape = draw(st.sampled_from([(batch,), (num_views, batch)]))
        arguments["logq"] = draw(st.floats(0, 10)) * randn(*shape, dtype=dtype, seed=draw(SEEDS))
    ids = draw(st.sampled_from(["none", "labels", "duplicates"]))
    if ids == "duplicates" or (ids == "labels" and objective in LABEL_OBJECTIVES):
        classes = draw(st.integers(2, 12))
        arguments[ids] = torch.randint(
            -classes, classes, (batch,), generator=torch.Generator().manual_seed(draw(SEEDS))
        )
    if "labels" not in arguments and draw(st.booleans()):
        arguments["core_view"] = draw(st.integers(0, num_views - 1))
    views = [draw(tensors((batch, dim), dtype)) for _ in range(num_views)]
    temperature = math.exp(draw(st.floats(math.log(0.05), math.log(2.0))))
    return views, temperature, arguments, draw(SEEDS)


@pytest.mark.sanitize
@pytest.mark.parametrize("chosen", IMPLS)
@given(case=losses())
def test_info_nce(chosen, case):
    views, temperature, arguments, seed = case
    dtype = views[0].dtype
    stacked = torch.stack(views)
    temperature = torch.tensor(temperature, dtype=dtype)
    upstream = randn(*stacked.shape[:2], seed=seed) if arguments["reduction"] == "none" else None

    def dense_in(dtype):
        cast = {name: x.to(dtype) if name in ("queue", "logq") else x for name, x in arguments.items()}
        return run(spec.info_nce_loss, stacked.to(dtype), temperature.to(dtype), upstream, **cast)

    leaves = [v.detach().requires_grad_() for v in views]
    t = temperature.clone().requires_grad_()
    loss = info_nce_loss(leaves, temperature=t, impl=chosen, **arguments)
    weight = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    *grads, grad_temperature = torch.autograd.grad(loss, [*leaves, t], weight)
    want, eager = dense_in(torch.float64), dense_in(dtype)
    # The floor covers rows of one feature, and sums whose terms cancel: the rounding of terms of the scale's size.
    scale = (1 / temperature.double()).item() * (1 if upstream is None else upstream.abs().max().item())
    scale *= 1 if arguments["reduction"] == "mean" else stacked.shape[0] * stacked.shape[1]
    largest = max(1.0, stacked.double().norm(dim=-1).max().item() ** 2)
    length = max(1.0, 1 / stacked.double().norm(dim=-1).min().item())
    unit = 4 * torch.finfo(dtype).eps * scale * (1 if arguments["normalize"] else largest)
    assert_within("loss", loss.detach(), want[0], eager[0], unit)
    assert_within("grad", torch.stack(grads), want[1], eager[1], unit * length)
    assert_within("temperature", grad_temperature, want[2], eager[2], unit / temperature.item())


@pytest.mark.sanitize
@pytest.mark.parametrize("chosen", IMPLS)
@given(data=st.data())
def test_byol(chosen, data):
    num_views, dtype = data.draw(st.integers(1, 5)), data.draw(DTYPES)
    shape = (data.draw(SMALL), data.draw(st.integers(1, 200)))
    views = [data.draw(tensors(shape, dtype)) for _ in range(2 * num_views)]
    p, t = views[:num_views], views[num_views:]
    eps = 10 ** data.draw(st.floats(-12, 1))
    arguments = {"eps": eps, "reduction": data.draw(st.sampled_from(["none", "mean", "sum"]))}

    def gradient(function, dtype, **extra):
        leaves = [v.detach().to(dtype).requires_grad_() for v in p]
        targets = [v.to(dtype) for v in t]
        pair = num_views == 1
        loss = function(leaves[0] if pair else leaves, targets[0] if pair else targets, **arguments, **extra)
        weight = randn(*loss.shape).to(loss)
        return loss.detach(), torch.stack(torch.autograd.grad(loss, leaves, weight))

    got, want, eager = (
        gradient(byol_loss, dtype, impl=chosen),
        gradient(spec.byol_loss, torch.float64),
        gradient(spec.byol_loss, dtype),
    )
    terms = 1 if arguments["reduction"] == "mean" else num_views * shape[0]
    length = min(1 / eps, 1 / torch.stack(p).double().norm(dim=-1).min().item())
    # 2 - 2 cos: two reciprocal norms, two scaled rows, products and their sum, each rounded by half an eps.
    unit = 8 * torch.finfo(dtype).eps * terms
    assert_within("loss", got[0], want[0], eager[0], unit)
    assert_within("grad", got[1], want[1], eager[1], unit * max(length, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("chosen", IMPLS)
@given(data=st.data())
def test_ema(chosen, data):
    """Lists of any dtypes, shapes (also empty ones) and strides are averaged."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=6))
    targets = [data.draw(tensors(tuple(shape), data.draw(DTYPES))) for shape in shapes]
    sources = [data.draw(tensors(tuple(shape), data.draw(DTYPES))) for shape in shapes]
    momentum = data.draw(st.floats(0, 1))
    as_tensor = torch.tensor(momentum, dtype=torch.float64) if data.draw(st.booleans()) else None
    want = [
        (momentum * t.double() + (1 - momentum) * s.double()).to(t.dtype) for t, s in zip(targets, sources, strict=True)
    ]
    before = [t.clone() for t in targets]
    left = [s.clone() for s in sources]
    ema_update_(targets, sources, momentum if as_tensor is None else as_tensor, impl=chosen)
    for target, source, value, old, same in zip(targets, sources, want, before, left, strict=True):
        assert torch.equal(source, same)
        # t + w (s - t) in float32 at least: w, the difference, the product and the sum are rounded, each by half an
        # eps of at most |t| + |s|; then the result, by half an eps of the target's dtype.
        wide = torch.finfo(torch.promote_types(target.dtype, torch.float32)).eps
        narrow = torch.finfo(target.dtype)
        allowed = 2 * wide * (old.double().abs() + same.double().abs()) + narrow.eps * value.abs()
        assert ((target.double() - value).abs() <= allowed + narrow.tiny * narrow.eps).all()


@pytest.mark.parametrize("chosen", IMPLS)
@settings(max_examples=50)
@given(seed=SEEDS, num_views=st.integers(2, 4), batch=st.integers(2, 20), objective=st.sampled_from(OBJECTIVES))
def test_symmetries(chosen, seed, num_views, batch, objective):
    """Losses do not depend on the order of samples and views, a rotation of the features, or the length of rows."""
    x = randn(num_views, batch, 6, dtype=torch.float64, seed=seed)

    def loss(views):
        return info_nce_loss(views, objective=objective, temperature=0.3, reduction="none", impl=chosen)

    want = loss(x)
    generator = torch.Generator().manual_seed(seed)
    samples, views = torch.randperm(batch, generator=generator), torch.randperm(num_views, generator=generator)
    assert_within("samples", loss(x[:, samples]), want[:, samples])
    assert_within("views", loss(x[views]), want[views])
    rotation = torch.linalg.qr(randn(6, 6, dtype=torch.float64, seed=seed + 1))[0]
    assert_within("rotation", loss(x @ rotation), want)
    length = randn(num_views, batch, 1, dtype=torch.float64, seed=seed + 2).exp()
    assert_within("length", loss(x * length), want)
    if objective != "decoupled":
        assert (want >= 0).all()
