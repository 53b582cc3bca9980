"""ema_update_: values for every pair of dtypes, refused arguments, autograd and torch.compile."""

import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops
from selfsup_kernels.ema import overlap

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]


def truth(target, source, momentum):
    """Compute the average in float64, element by element."""
    return momentum * target.double() + (1 - momentum) * source.double()


def assert_rounded(got, want, target, source):
    """Allow one rounding to the target's dtype, after a few in the arithmetic's dtype."""
    info = torch.finfo(got.dtype)
    arithmetic = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    allowed = info.eps / 2 * want.abs() + info.tiny * info.eps / 2  # half the smallest number
    allowed += 4 * arithmetic.eps * (target.double().abs() + source.double().abs())
    excess = ((got.double() - want).abs() - allowed).max().item()
    assert excess <= 0, f"error beyond rounding by {excess:.3e}"


@pytest.mark.parametrize("momentum", [0.0, 0.37, 0.996, 1.0])
@pytest.mark.parametrize("source_dtype", FLOATING)
@pytest.mark.parametrize("target_dtype", FLOATING)
def test_every_pair_of_dtypes(impl, target_dtype, source_dtype, momentum):
    shapes = [(7,), (), (3, 5), (1, 1), (0, 4), (2, 3, 33), (1000,)]
    targets = [randn(math.prod(s), dtype=target_dtype, seed=i).view(s) for i, s in enumerate(shapes)]
    sources = [randn(math.prod(s), dtype=source_dtype, seed=100 + i).view(s) for i, s in enumerate(shapes)]
    before = [t.clone() for t in targets]
    kept = [s.clone() for s in sources]
    assert sk.ema_update_(targets, sources, momentum, impl=impl) is None
    for t, b, s, k in zip(targets, before, sources, kept, strict=True):
        assert t.dtype == target_dtype
        assert torch.equal(s, k)
        if t.numel():
            assert_rounded(t, truth(b, s, momentum), b, s)
        if momentum == 1:
            assert torch.equal(t, b)
        elif momentum == 0 and source_dtype == target_dtype:
            assert torch.equal(t, s)


def test_a_mixed_list_in_one_call(impl):
    dtypes = [(t, s) for t in FLOATING for s in FLOATING]
    targets = [randn(5, dtype=t, seed=i) for i, (t, _) in enumerate(dtypes)]
    sources = [randn(5, dtype=s, seed=50 + i) for i, (_, s) in enumerate(dtypes)]
    integers = [torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor(3, dtype=torch.int32)]
    new = [torch.tensor([2**40, -5]), torch.tensor([False, True]), torch.tensor(-9, dtype=torch.int32)]
    before = [t.clone() for t in targets]
    sk.ema_update_([*targets, *integers], [*sources, *new], 0.75, impl=impl)
    for t, b, s in zip(targets, before, sources, strict=True):
        assert_rounded(t, truth(b, s, 0.75), b, s)
    for t, s in zip(integers, new, strict=True):
        assert torch.equal(t, s)  # copied, not averaged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_momentum_as_a_tensor(impl, dtype):
    momentum = torch.tensor(0.8125, dtype=dtype)  # exact in every dtype
    target, source = randn(9), randn(9, seed=1)
    expected = target.clone()
    sk.ema_update_([expected], [source], 0.8125, impl=impl)
    sk.ema_update_([target], [source], momentum.requires_grad_(), impl=impl)
    assert torch.equal(target, expected)


def strided(base, kind):
    return {
        "transposed": base.t(),
        "columns": base[:, 1::2],
        "rows": base[::3],
        "channels_last": base.reshape(2, 3, 2, -1).to(memory_format=torch.channels_last),
    }[kind]


@pytest.mark.parametrize("kind", ["transposed", "columns", "rows", "channels_last"])
@pytest.mark.parametrize("which", ["target", "source", "both"])
def test_strides(impl, kind, which):
    target, source = strided(randn(12, 6), kind), strided(randn(12, 6, seed=1), kind)
    target = target if which != "source" else target.contiguous()
    source = source if which != "target" else source.contiguous()
    expected = truth(target, source, 0.6)
    before = target.clone()
    sk.ema_update_([target], [source], 0.6, impl=impl)
    assert_rounded(target, expected, before, source)


def test_memory_between_the_elements_of_a_target_is_unchanged(impl):
    base = torch.zeros(10, 6)
    sk.ema_update_([base[:, 2:4], base[1::2, 5]], [torch.ones(10, 2), torch.ones(5)], 0.0, impl=impl)
    expected = torch.zeros(10, 6)
    expected[:, 2:4] = 1
    expected[1::2, 5] = 1
    assert torch.equal(base, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_come_through(impl, value):
    for dtype in FLOATING:
        target, source = torch.ones(40, dtype=dtype), torch.ones(40)
        source[33] = value
        target[2] = value
        sk.ema_update_([target], [source], 0.5, impl=impl)
        assert not target[33].isfinite()
        assert not target[2].isfinite()
        assert torch.equal(target[3:33], torch.ones(30, dtype=dtype))


def test_nothing_to_do(impl):
    sk.ema_update_([], [], 0.5, impl=impl)
    sk.ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, impl=impl)
    same = torch.tensor([1.0, math.inf, 3.0])  # inf - inf would be NaN
    other = torch.zeros(3)
    views = [same, same.view(3), same.detach()]
    for source in views:
        sk.ema_update_([same, other], [source, torch.ones(3)], 0.5, impl=impl)
        assert torch.equal(same, torch.tensor([1.0, math.inf, 3.0]))
    assert torch.equal(other, torch.tensor([0.875] * 3))
    # During tracing, only the op itself can detect that a source is its destination.
    ops.overload("ema_update_", impl)([same], [same.view(3)], None, 0.5, None)
    assert torch.equal(same, torch.tensor([1.0, math.inf, 3.0]))


def test_nothing_to_do_by_the_kernels_of_a_gpu(monkeypatch):
    """An empty list has no device that an implementation could refuse."""
    gpu = "cuda"
    monkeypatch.setitem(backends._reasons, gpu, None)
    monkeypatch.setattr(backends, "emulated", lambda impl: False)
    sk.ema_update_([], [], 0.5, impl=gpu)
    monkeypatch.setitem(backends._reasons, gpu, "there is none.")
    with pytest.raises(RuntimeError, match="cannot be used here: there is none"):
        sk.ema_update_([], [], 0.5, impl=gpu)


def test_sources_may_be_shared_and_expanded(impl):
    source = torch.ones(4)
    targets = [torch.zeros(4), torch.zeros(4), torch.zeros(2, 4)]
    sk.ema_update_(targets, [source, source, source.expand(2, 4)], 0.5, impl=impl)
    assert all((t == 0.5).all() for t in targets)


def test_generators_of_tensors(impl):
    target, source = nn.Linear(2, 3), nn.Linear(2, 3)
    sk.ema_update_(target.parameters(), source.parameters(), 0.0, impl=impl)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_thread_count_does_not_matter(impl):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        targets = [randn(100_003, dtype=torch.bfloat16), randn(70_001, seed=2)]
        sources = [randn(100_003, seed=3), randn(70_001, seed=4)]
        generator = torch.Generator().manual_seed(7)
        sk.ema_update_(targets, sources, 0.9, stochastic_rounding=True, generator=generator, impl=impl)
        results.append(targets)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Refused arguments. Every case gives targets, sources and momentum.


def _z(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def _overlapping(make):
    base = torch.arange(24.0)
    return make(base)


REFUSED = {
    "lengths": (lambda: ([_z(3), _z(3)], [_z(3)], 0.5), ValueError, "sources: expected 2 tensors.*got 1"),
    "shape": (lambda: ([_z(3), _z(2, 3)], [_z(3), _z(3, 2)], 0.5), ValueError, r"sources\[1\].*\(2, 3\).*\(3, 2\)"),
    "broadcast": (lambda: ([_z(2, 3)], [_z(3)], 0.5), ValueError, r"sources\[0\].*shape"),
    "broadcast scalar": (lambda: ([_z(1)], [_z(())], 0.5), ValueError, r"sources\[0\].*shape"),
    "empty against full": (lambda: ([_z(0, 3)], [_z(0, 4)], 0.5), ValueError, r"sources\[0\].*shape"),
    "momentum above": (lambda: ([_z(3)], [_z(3)], 1.0001), ValueError, "momentum.*1.0001"),
    "momentum below": (lambda: ([_z(3)], [_z(3)], -0.1), ValueError, "momentum.*-0.1"),
    "momentum nan": (lambda: ([_z(3)], [_z(3)], math.nan), ValueError, "momentum.*nan"),
    "momentum nan tensor": (lambda: ([_z(3)], [_z(3)], torch.tensor(math.nan)), ValueError, "momentum.*nan"),
    "momentum vector": (lambda: ([_z(3)], [_z(3)], torch.ones(2)), ValueError, "momentum.*shape"),
    "momentum text": (lambda: ([_z(3)], [_z(3)], "0.9"), TypeError, "momentum.*str"),
    "momentum bool": (lambda: ([_z(3)], [_z(3)], True), TypeError, "momentum.*bool"),
    "momentum with nothing to do": (lambda: ([], [], 2), ValueError, "momentum"),
    "device": (lambda: ([_z(3)], [_z(3, device="meta")], 0.5), ValueError, r"sources\[0\].*device.*meta"),
    "two devices": (
        lambda: ([_z(3), _z(3, device="meta")], [_z(3), _z(3, device="meta")], 0.5),
        ValueError,
        r"targets\[1\].*device.*meta",
    ),
    "a tensor": (lambda: (_z(2, 3), [_z(3), _z(3)], 0.5), TypeError, "targets: expected a list.*Tensor"),
    "a number": (lambda: ([_z(3)], [3.0], 0.5), TypeError, r"sources\[0\].*float"),
    "a name": (lambda: ({"a": _z(3)}, {"a": _z(3)}, 0.5), TypeError, r"targets: .*got dict; pass its values\(\)"),
    "a module and a list": (lambda: (nn.Linear(2, 2), [_z(3)], 0.5), TypeError, "sources.*nn.Module.*list"),
    "integer source": (lambda: ([_z(3)], [_z(3, dtype=torch.int64)], 0.5), TypeError, r"sources\[0\].*int64"),
    "integer target": (lambda: ([_z(3, dtype=torch.int64)], [_z(3)], 0.5), TypeError, r"sources\[0\].*float32"),
    "two integer dtypes": (
        lambda: ([_z(3, dtype=torch.int64)], [_z(3, dtype=torch.int32)], 0.5),
        TypeError,
        r"sources\[0\].*int32",
    ),
    "complex and real": (lambda: ([_z(3).cfloat()], [_z(3)], 0.5), TypeError, r"sources\[0\].*complex64.*float32"),
    "real and complex": (lambda: ([_z(3)], [_z(3).cfloat()], 0.5), TypeError, r"sources\[0\].*float32.*complex64"),
    "float8": (
        lambda: ([_z(3).to(torch.float8_e5m2)], [_z(3).to(torch.float8_e5m2)], 0.5),
        TypeError,
        r"targets\[0\].*float8",
    ),
    "sparse": (lambda: ([torch.eye(3).to_sparse()], [torch.eye(3)], 0.5), TypeError, r"targets\[0\].*sparse"),
    "twice": (lambda: _overlapping(lambda b: ([b, _z(2), b], [_z(24), _z(2), _z(24)], 0.5)), ValueError, "once"),
    "twice as views": (lambda: _overlapping(lambda b: ([b[:], b[:]], [_z(24)] * 2, 0.5)), ValueError, "once"),
    "twice, once from itself": (lambda: _overlapping(lambda b: ([b, b], [b, _z(24)], 0.5)), ValueError, "once"),
    "expanded": (lambda: ([_z(3, 1).expand(3, 4)], [_z(3, 4)], 0.5), RuntimeError, r"targets\[0\].*expanded"),
    "unfolded": (lambda: ([_z(6).unfold(0, 3, 1)], [_z(4, 3)], 0.5), RuntimeError, r"targets\[0\].*share memory"),
    "targets overlap": (
        lambda: _overlapping(lambda b: ([b[:9], b[8:]], [_z(9), _z(16)], 0.5)),
        RuntimeError,
        r"targets\[1\].*overlaps targets\[0\]",
    ),
    "targets overlap from one start": (
        lambda: _overlapping(lambda b: ([b, b[:3]], [_z(24), _z(3)], 0.5)),
        RuntimeError,
        r"targets\[1\].*overlaps targets\[0\]",
    ),
    "targets overlap as another dtype": (
        lambda: _overlapping(lambda b: ([b, b.view(torch.bfloat16)], [_z(24), _z(48)], 0.5)),
        RuntimeError,
        "overlaps",
    ),
    "source overlaps its target": (
        lambda: _overlapping(lambda b: ([b[1:]], [b[:-1]], 0.5)),
        RuntimeError,
        r"targets\[0\].*overlaps sources\[0\]",
    ),
    "source is its target, transposed": (
        lambda: _overlapping(lambda b: ([b[:16].view(4, 4)], [b[:16].view(4, 4).t()], 0.5)),
        RuntimeError,
        r"targets\[0\].*overlaps sources\[0\]",
    ),
    "source overlaps another target": (
        lambda: _overlapping(lambda b: ([_z(2), b[:5]], [b[4:6], _z(5)], 0.5)),
        RuntimeError,
        r"targets\[1\].*overlaps sources\[0\]",
    ),
    "source is another target": (
        lambda: _overlapping(lambda b: ([_z(24), b], [b, _z(24)], 0.5)),
        RuntimeError,
        r"targets\[1\].*overlaps sources\[0\]",
    ),
    "crossing columns": (
        lambda: _overlapping(lambda b: ([b.view(4, 6)[:, :3], b.view(4, 6)[:, 2:]], [_z(4, 3), _z(4, 4)], 0.5)),
        RuntimeError,
        "overlaps",
    ),
    "hidden behind a wide one": (  # the third overlaps the first, not its neighbour in memory
        lambda: _overlapping(lambda b: ([b.view(4, 6)[:, ::2], b[1:2], b[18:19]], [_z(4, 3), _z(1), _z(1)], 0.5)),
        RuntimeError,
        r"targets\[2\].*overlaps targets\[0\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(impl, case):
    make, error, message = REFUSED[case]
    targets, sources, momentum = make()
    good = torch.full((5,), 3.0)
    if isinstance(targets, list):  # before the bad ones, so that a late check is noticed by its change
        targets = [good, *targets]
        sources = [torch.ones(5), *sources] if isinstance(sources, list) else sources
        for i in (3, 2, 1, 0):
            message = message.replace(rf"\[{i}\]", rf"\[{i + 1}\]")
        message = message.replace("expected 2 tensors", "expected 3 tensors").replace("got 1", "got 2")
    flat = targets.parameters() if isinstance(targets, nn.Module) else targets
    flat = [t for t in flat if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [t.detach().clone() for t in flat]
    with pytest.raises(error, match=message):
        sk.ema_update_(targets, sources, momentum, impl=impl)
    for t, b in zip(flat, before, strict=True):
        assert t.to_dense().tolist() == b.to_dense().tolist() if t.is_sparse else t.tolist() == b.tolist()


def test_unknown_impl():
    for tensors in ([], [torch.zeros(2)]):
        with pytest.raises(ValueError, match=r"impl.*'fast'"):
            sk.ema_update_(tensors, [t.clone() for t in tensors], 0.5, impl="fast")


def test_interleaved_columns_are_no_overlap(impl):
    """The address ranges overlap, but no element is shared."""
    base = randn(5, 7)
    expected = truth(base, torch.ones(5, 7), 0.5).float()
    targets = [base[:, :2], base[:, 2], base[:, 3:].t()]
    sk.ema_update_(targets, [torch.ones(t.shape) for t in targets], 0.5, impl=impl)
    torch.testing.assert_close(base, expected)
    # A target next to its source in one matrix.
    sk.ema_update_([base[::2]], [base[:-1][::2].new_ones(3, 7)], 0.0, impl=impl)
    sk.ema_update_([base[:, 0::2]], [base[:, [1, 3, 5, 6]]], 0.0, impl=impl)
    sk.ema_update_([base[:, 0]], [base[:, 1]], 0.0, impl=impl)
    assert torch.equal(base[:, 0], base[:, 1])


_BASE = torch.zeros(400, dtype=torch.uint8)


@st.composite
def _views_of_base(draw):
    base = _BASE.view(draw(st.sampled_from([torch.uint8, torch.float16, torch.float32])))
    sizes = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    strides = [draw(st.integers(0, 12)) for _ in sizes]
    most = len(base) - 1 - sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    hypothesis.assume(most >= 0)
    return base.as_strided(sizes, strides, draw(st.integers(0, min(most, 20))))


def _addresses(tensor):
    first = [tensor.data_ptr()]
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        first = [a + k * stride * tensor.element_size() for a in first for k in range(n)]
    return first


@hypothesis.given(_views_of_base(), _views_of_base())
@hypothesis.settings(max_examples=500)
def test_overlaps_are_exact(a, b):
    """Compare with sets of addresses."""
    bytes_of = [{x + k for x in _addresses(t) for k in range(t.element_size())} for t in (a, b)]
    assert overlap.shares_memory(a, b) == bool(bytes_of[0] & bytes_of[1])
    assert overlap.overlaps_itself(a) == (len(set(_addresses(a))) < a.numel())
    low, high = overlap.bounds(a)
    assert (low, high) == (min(bytes_of[0]), max(bytes_of[0]) + 1)


# Modules


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_modules_by_name(impl):
    target, source = model(0), model(1)
    source(torch.randn(5, 2, 4, 4))
    names = dict(source.named_parameters()) | dict(source.named_buffers())
    before = {k: v.detach().clone() for k, v in (*target.named_parameters(), *target.named_buffers())}
    sk.ema_update_(target, source, 0.9, impl=impl)
    for name, t in (*target.named_parameters(), *target.named_buffers()):
        if t.is_floating_point():
            assert_rounded(
                t.detach(), truth(before[name], names[name].detach(), 0.9), before[name], names[name].detach()
            )
        else:
            assert t.item() == 1  # num_batches_tracked


def test_a_compiled_module_matches_its_original(impl):
    target, source = model(0), torch.compile(model(1), backend="eager")
    sk.ema_update_(target, source, 0.0, impl=impl)
    assert torch.equal(target[3].weight, source._orig_mod[3].weight)
    target = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    source = nn.Sequential(nn.Linear(2, 2))
    sk.ema_update_(target, source, 0.0, impl=impl)
    assert torch.equal(target[0].weight, source[0].weight)


def test_modules_of_different_structure(impl):
    target, source = model(0), model(1)
    source[3] = nn.Linear(12, 4, bias=False)
    source.register_buffer("extra", torch.zeros(2))
    before = [p.detach().clone() for p in target.parameters()]
    with pytest.raises(ValueError, match=r"only in the target: 3\.bias; only in the source: extra"):
        sk.ema_update_(target, source, 0.0, impl=impl)
    source = model(1)
    source[3] = nn.Linear(13, 4)
    with pytest.raises(ValueError, match=r"3\.weight \(source\).*3\.weight \(target\)"):
        sk.ema_update_(target, source, 0.0, impl=impl)
    assert all(torch.equal(p, b) for p, b in zip(target.parameters(), before, strict=True))


# Autograd and torch.compile


def test_parameters_that_require_grad(impl):
    target, source = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    sk.ema_update_([target], [source], 0.5, impl=impl)
    assert target.requires_grad
    assert target.is_leaf
    assert torch.equal(target.detach(), torch.full((3,), 0.5))
    (target * source).sum().backward()
    assert torch.equal(target.grad, torch.ones(3))


def test_autograd_notices_the_write(impl):
    target, source = nn.Parameter(torch.ones(3)), torch.zeros(3)
    loss = (target * target).sum()
    sk.ema_update_([target], [source], 0.5, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors(impl):
    with torch.inference_mode():
        target = torch.zeros(3)
        sk.ema_update_([target], [torch.ones(3)], 0.5, impl=impl)
    assert (target == 0.5).all()


@pytest.fixture
def compiled():
    torch._dynamo.reset()

    def compile_(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield compile_
    torch._dynamo.reset()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compile_lists(impl, compiled, as_tensor):
    momentum = torch.tensor(0.75) if as_tensor else 0.75
    targets = [nn.Parameter(randn(4)), randn(2, 3, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(3)]
    sources = [nn.Parameter(randn(4, seed=1)), randn(2, 3, seed=2), torch.zeros(0), torch.tensor(7)]
    expected = [t.detach().clone() for t in targets]
    sk.ema_update_(expected, sources, 0.75, impl=impl)

    @compiled
    def step(x):
        sk.ema_update_(targets, sources, momentum, impl=impl)
        return targets[0] * x

    got = step(torch.ones(4))
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))
    assert torch.equal(got, expected[0])


def test_compile_modules_and_intermediate_tensors(impl, compiled):
    target, source = model(0), model(1)
    expected = model(0)
    sk.ema_update_(expected, source, 0.5, impl=impl)
    running = torch.zeros(3)

    @compiled
    def step(x):
        sk.ema_update_(target, source, 0.5, impl=impl)
        sk.ema_update_([running], [x * 2], 0.5, impl=impl)
        return running + x

    got = step(torch.ones(3))
    assert torch.equal(running, torch.ones(3))
    assert torch.equal(got, torch.full((3,), 2.0))
    for t, e in zip(target.parameters(), expected.parameters(), strict=True):
        assert torch.equal(t, e)


def test_compile_stochastic_rounding(impl, compiled):
    targets = [torch.zeros(4096, dtype=torch.bfloat16) for _ in range(2)]

    @compiled
    def step(target):
        sk.ema_update_([target], [torch.full((4096,), 1.001)], 0.0, stochastic_rounding=True, impl=impl)

    for target in targets:
        step(target)
        assert set(target.tolist()) == {1.0, 1.0078125}
    assert not torch.equal(*targets)
