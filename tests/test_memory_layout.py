"""Results do not depend on strides, offsets, containers or threads, and memory is linear in the rows."""

import pytest
import torch
from helpers import randn, random_labels, run
from torch.profiler import ProfilerActivity, profile

from selfsup_kernels import byol_loss, info_nce_loss
from selfsup_kernels.info_nce import few_scores, one_way, reference
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(x):
    """Yield (name, tensor) with the numbers of ``x`` (V, B, D) in several memory layouts."""
    num_views, batch, dim = x.shape
    yield "contiguous", x.contiguous()
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "views last", x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    big = torch.full((num_views + 2, batch + 3, dim + 5), torch.nan, dtype=x.dtype)
    big[1:-1, 2:-1, 3:-2] = x
    yield "inside a bigger tensor", big[1:-1, 2:-1, 3:-2]
    wide = torch.full((num_views, 2 * batch, 3 * dim), torch.nan, dtype=x.dtype)
    wide[:, ::2, ::3] = x
    yield "every other element", wide[:, ::2, ::3]
    flat = torch.full((1 + x.numel(),), torch.nan, dtype=x.dtype)
    flat[1:] = x.flatten()
    yield "not aligned", flat[1:].view(x.shape)


def gradients(loss_function, x):
    """Return loss and gradient; assert that a (V, B, D) tensor and the list of its views give the same."""
    stacked = x.detach().requires_grad_()
    as_list = [v.detach().requires_grad_() for v in x.detach()]
    loss = loss_function(stacked)
    loss.sum().backward()
    other = loss_function(as_list)
    other.sum().backward()
    assert torch.equal(loss, other)
    assert torch.equal(stacked.grad, torch.stack([v.grad for v in as_list]))
    return loss.detach(), stacked.grad


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 37, 19), (3, 16, 32), (2, 5, 1)], ids=str)
def test_info_nce_layouts_agree_bit_for_bit(op_impl, size, dtype):
    x = randn(*size, dtype=dtype)
    want = gradients(lambda v: info_nce_loss(v, reduction="none", impl=op_impl), x)
    for name, other in layouts(x):
        got = gradients(lambda v: info_nce_loss(v, reduction="none", impl=op_impl), other)
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 37, 19), (3, 16, 32), (2, 5, 1)], ids=str)
def test_byol_layouts_agree_bit_for_bit(op_impl, size, dtype):
    x, target = randn(*size, dtype=dtype), randn(*size, dtype=dtype, seed=1)
    want = gradients(lambda v: byol_loss(v, target, reduction="none", impl=op_impl), x)
    for (name, other), (target_name, other_target) in zip(layouts(x), reversed(list(layouts(target))), strict=True):
        got = gradients(lambda v, t=other_target: byol_loss(v, t, reduction="none", impl=op_impl), other)
        assert torch.equal(got[0], want[0]), (name, target_name)
        assert torch.equal(got[1], want[1]), (name, target_name)


def test_layout_of_labels_queue_and_upstream_gradient(impl):
    views, queue, labels = randn(2, 21, 12), randn(9, 12, seed=1), random_labels(21, 5)
    upstream = randn(2, 21, seed=2)
    results = []
    for strided in (False, True):
        x = views.clone().requires_grad_()
        arguments = {
            "queue": queue.T.contiguous().T if strided else queue,
            "labels": labels.repeat_interleave(3)[::3] if strided else labels,
        }
        loss = info_nce_loss(x, reduction="none", impl=impl, **arguments)
        loss.backward(upstream.T.contiguous().T if strided else upstream)
        results.append((loss, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_views_of_different_strides_and_one_tensor_twice(impl):
    x = randn(3, 15, 10)
    mixed = [x[0], x[1].T.contiguous().T, torch.cat([x[2], x[2]], 1)[:, :10]]
    assert torch.equal(info_nce_loss(mixed, impl=impl), info_nce_loss(x, impl=impl))
    same = x[0].clone().requires_grad_()
    info_nce_loss([same, same], impl=impl).backward()
    apart = x[:1].expand(2, -1, -1).contiguous().requires_grad_()
    info_nce_loss(apart, impl=impl).backward()
    torch.testing.assert_close(same.grad, apart.grad.sum(0))


def test_expanded_views(impl):
    """Views that ``expand`` makes of one row, with stride zero, give the same as copies."""
    row = randn(1, 1, 8)
    got = gradients(lambda v: info_nce_loss(v, reduction="none", impl=impl), row.expand(2, 6, 8))
    want = gradients(lambda v: info_nce_loss(v, reduction="none", impl=impl), row.expand(2, 6, 8).contiguous())
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_only_views_that_require_a_gradient_get_one(impl):
    x, y = randn(2, 9, 6).unbind(0)
    x = x.clone().requires_grad_()
    info_nce_loss([x, y], impl=impl).backward()
    both = torch.stack([x.detach(), y]).requires_grad_()
    info_nce_loss(both, impl=impl).backward()
    assert torch.equal(x.grad, both.grad[0])
    assert y.grad is None


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["plain", "labels", "queue", "core"])
@pytest.mark.parametrize("size", [(2, 2, 1), (2, 300, 65), (3, 129, 128), (5, 67, 33), (2, 1100, 16)], ids=str)
def test_same_bits_with_any_number_of_threads(impl, size, form):
    views = randn(*size)
    arguments = {
        "plain": {},
        "labels": {"labels": random_labels(size[1], 9)},
        "queue": {"queue": randn(300, size[2], seed=1)},
        "core": {"core_view": 1, "objective": "pairwise"},
    }[form]
    results = []
    # PyTorch may split the reference's sums by threads: the reference only has to be repeatable.
    for threads in (1, 2, 2, 3) if impl != "reference" else (2, 2):
        torch.set_num_threads(threads)
        x, t = views.clone().requires_grad_(), torch.tensor(0.07, requires_grad=True)
        loss = info_nce_loss(x, temperature=t, reduction="none", impl=impl, **arguments)
        loss.sum().backward()
        results.append((loss.detach(), x.grad, t.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("size", [(2, 2, 1), (3, 1000, 33)], ids=str)
def test_byol_same_bits_with_any_number_of_threads(impl, size):
    results = []
    for threads in (1, 2, 3) if impl != "reference" else (2, 2):
        torch.set_num_threads(threads)
        p = randn(*size).requires_grad_()
        loss = byol_loss(p, randn(*size, seed=1), impl=impl)
        loss.backward()
        results.append((loss.detach(), p.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def peak_bytes(function):
    """Return the peak memory of ``function`` from the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        function()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("form", ["plain", "pairwise", "labels", "duplicates", "labels across views"])
def test_memory_is_linear_in_the_rows(op_impl, form, monkeypatch):
    """The peak is far below the similarity matrix, which has 1 GB at M = 16384 in float32."""
    rows, dim = (2048 if op_impl == "reference" else 16384), 32
    # The reference holds chunks of scores of constant size; with small chunks few rows suffice to measure its memory.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 2**18)
    views = randn(2, rows // 2, dim).requires_grad_()
    ids = random_labels(rows // 2, 50)
    arguments = {
        "plain": {},
        "pairwise": {"objective": "pairwise"},
        "labels": {"labels": ids},
        "duplicates": {"duplicates": ids, "logq": randn(rows // 2)},
        "labels across views": {"labels": ids, "objective": "cross_view"},
    }[form]
    arguments = {"objective": "supcon_in"} | arguments

    def step():
        info_nce_loss(views, impl=op_impl, **arguments).backward()

    # Unit rows, gradient and scratch take 8 times the rows; the float64 tables and their scratch 64 doubles per row.
    # The constant covers tiles of all threads, or some float64 temporaries of a chunk.
    allowed = rows * (8 * 4 * dim + 64 * 8) + 2**23
    assert 4 * rows * dim < peak_bytes(step) < allowed < 4 * rows * rows


@pytest.mark.parametrize("objective", ["supcon_out", "per_positive"])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (4096, 1024)])
def test_memory_of_one_way_is_linear_in_anchors_and_columns(objective, rows, columns, monkeypatch):
    monkeypatch.setattr(one_way, "_BLOCK_BYTES", 2**19)
    dim = 32
    anchors, others = randn(rows, dim).requires_grad_(), randn(columns, dim, seed=1).requires_grad_()
    labels, column_labels = random_labels(rows, 50), random_labels(columns, 50, seed=1)

    def step():
        losses = one_way.losses(anchors, others, labels, column_labels, temperature=0.1, objective=objective)
        losses.sum().backward()

    # Unit rows, gradients and scratch take 8 times the rows; the float64 tables and their scratch 16 doubles per row.
    allowed = (rows + columns) * (8 * 4 * dim + 16 * 8) + 5 * 2**19
    assert 4 * (rows + columns) * dim < peak_bytes(step) < allowed < 4 * rows * columns


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autograd_keeps_at_most_ten_times_the_scores(objective, labelled):
    if labelled and objective not in LABEL_OBJECTIVES:
        return
    views = randn(2, 256, 8).requires_grad_()
    labels = random_labels(256, 50) if labelled else None
    most = 10 * 4 * (256 * 256 if objective == "cross_view" else 512 * 512)
    peak = peak_bytes(lambda: info_nce_loss(views, labels=labels, objective=objective, impl="reference").backward())
    assert most / 10 < peak < most


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", ["plain", "queue", "core view", "labels"])
def test_the_reference_in_one_block_and_in_many(objective, form, monkeypatch):
    """One block of all scores gives the same as blocks of 3, 3 and 1 samples, or of 1 sample each."""
    if form == "labels" and objective not in LABEL_OBJECTIVES:
        return
    arguments = {
        "plain": {},
        "queue": {"queue": randn(5, 6, dtype=torch.float64, seed=1)},
        "core view": {"core_view": 1},
        "labels": {"labels": random_labels(7, 3), "queue": randn(5, 6, dtype=torch.float64, seed=1)},
    }[form]
    views, upstream = randn(3, 7, 6, dtype=torch.float64), randn(3, 7, dtype=torch.float64, seed=2)
    drawn, results = [], []
    blocks = reference._blocks
    monkeypatch.setattr(
        reference, "_blocks", lambda *a, **k: [drawn.append(block[0]) or block for block in blocks(*a, **k)]
    )
    columns = 7 * (2 if objective == "cross_view" else 3) + 5 * ("queue" in arguments)
    monkeypatch.setattr(few_scores, "takes", lambda *_: False)
    for samples in (7, 3, 1):
        monkeypatch.setattr(reference, "_BLOCK_BYTES", 8 * 3 * columns * samples)
        drawn.clear()
        results.append(
            run(
                info_nce_loss,
                views,
                0.2,
                upstream,
                objective=objective,
                reduction="none",
                impl="reference",
                **arguments,
            )
        )
        assert len(drawn) == 2 * -(-7 // samples)  # forward and backward
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_same_bits_with_any_number_of_threads_on_one_wide_block(impl):
    """The matrix library must not split a single tile across threads either."""
    if impl == "reference":
        return  # torch's own product determines the order of summation
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(gradients(lambda x: info_nce_loss(x, impl=impl), randn(2, 16, 4096, dtype=torch.float64)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
