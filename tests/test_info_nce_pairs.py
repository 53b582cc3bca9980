"""Check which pairs count, and for what: ``duplicates``, ``logq``, and ``labels`` with ``cross_view``."""

import math

import pytest
import torch
from helpers import (
    LOW_PRECISION,
    PAIRED_OBJECTIVES,
    assert_within,
    check_against_loops,
    compare_info_nce,
    randn,
    random_labels,
    run,
)
from parts import compare_parts

from selfsup_kernels import InfoNCELoss, info_nce_loss
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

CLASSES = [1, 4, 40, 10**6]
F64 = torch.float64


@pytest.mark.parametrize("form", ["plain", "queue", "core view", "logq"])
@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates_against_loops(impl, objective, num_views, form):
    views = randn(num_views, 6, 5, dtype=F64, seed=5)
    arguments = {
        "plain": {},
        "queue": {"queue": randn(4, 5, dtype=F64, seed=6)},
        "core view": {"core_view": 1},
        "logq": {"logq": randn(6, dtype=F64, seed=7)},
    }[form]
    duplicates = torch.tensor([4, -1, 4, 9, -1, 4])
    check_against_loops(impl, views, 0.2, objective=objective, duplicates=duplicates, **arguments)


@pytest.mark.parametrize("shape", [(6,), (3, 6)], ids=str)
@pytest.mark.parametrize("form", ["plain", "labels", "core view"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logq_against_loops(impl, objective, form, shape):
    if form == "labels" and objective not in LABEL_OBJECTIVES:
        return
    arguments = {"plain": {}, "labels": {"labels": torch.tensor([4, -1, 4, 9, -1, 4])}, "core view": {"core_view": 1}}
    logq = 2 * randn(*shape, dtype=F64, seed=7) - 5
    views = randn(3, 6, 5, dtype=F64, seed=5)
    check_against_loops(impl, views, 0.2, objective=objective, logq=logq, **arguments[form])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_duplicates(op_impl, objective, classes, dtype):
    """Duplicates are right if all samples share an id (only the queue has negatives), and if none do."""
    views, ids = randn(3, 65, 16, dtype=dtype), random_labels(65, classes)
    queue = randn(10, 16, dtype=dtype, seed=1) if classes == 1 else None
    compare_info_nce(op_impl, views, objective=objective, duplicates=ids, queue=queue)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("size", [(2, 300, 24), (5, 33, 130)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logq(op_impl, objective, size, dtype):
    """logq is right for blocks of several views and several blocks, with ids and without."""
    views, ids = randn(*size, dtype=dtype), random_labels(size[1], 20)
    logq = 3 * randn(*size[:2], dtype=dtype, seed=3)
    compare_info_nce(op_impl, views, objective=objective, logq=logq)
    compare_info_nce(op_impl, views, objective=objective, logq=logq, duplicates=ids)
    if objective in LABEL_OBJECTIVES:
        compare_info_nce(op_impl, views, objective=objective, logq=logq[0], labels=ids)


@pytest.mark.sanitize
@pytest.mark.parametrize("temperature", [0.5, 0.02, 0.005])
@pytest.mark.parametrize("form", ["duplicates", "logq", "labels", "labels and logq"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_temperatures(op_impl, objective, form, temperature):
    """Low temperatures are right, where sums underflow and rows have a path of their own."""
    if "labels" in form and objective not in LABEL_OBJECTIVES:
        return
    arguments = {name: random_labels(70, 25) for name in ("duplicates", "labels") if name in form}
    if "logq" in form:
        arguments["logq"] = 20 * randn(70, seed=3)
    compare_info_nce(op_impl, randn(2, 70, 12), temperature, objective=objective, cancels=True, **arguments)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_low_precision(impl, objective, dtype):
    views, ids, logq = randn(2, 50, 32, dtype=dtype), random_labels(50, 20), 2 * randn(50, seed=3)
    compare_info_nce(impl, views, objective=objective, duplicates=ids, logq=logq)
    if objective in LABEL_OBJECTIVES:
        compare_info_nce(impl, views, objective=objective, labels=ids, logq=logq)


@pytest.mark.parametrize("form", ["duplicates", "labels"])
def test_rows_that_are_not_normalised(op_impl, form):
    for objective in OBJECTIVES:
        if form == "labels" and objective not in LABEL_OBJECTIVES:
            continue
        arguments = {form: random_labels(40, 15), "logq": randn(40, seed=3), "objective": objective}
        compare_info_nce(op_impl, 2 * randn(2, 40, 12), 1.5, normalize=False, **arguments)


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", [(23, 1, 40), (140, 113)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_several_processes(impl, objective, dtype, sizes):
    views, ids = randn(3, sum(sizes), 16, dtype=dtype), random_labels(sum(sizes), 30)
    logq = 2 * randn(3, sum(sizes), dtype=dtype, seed=3)
    compare_parts(impl, views, sizes, objective, duplicates=ids)
    compare_parts(impl, views, sizes, objective, logq=logq, duplicates=ids)
    if objective in LABEL_OBJECTIVES:
        compare_parts(impl, views, sizes, objective, logq=logq, labels=ids)


def same(got, want):
    for name, ours, other in zip(("loss", "grad", "temperature"), got, want, strict=True):
        assert_within(name, ours, other)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_should_not_change_anything(impl, objective):
    """Ids that all differ, and one log probability for all samples, give the loss without them."""
    views = randn(3, 20, 8, dtype=F64)
    want = run(info_nce_loss, views, 0.1, objective=objective, impl=impl)
    same(run(info_nce_loss, views, 0.1, objective=objective, duplicates=torch.randperm(20), impl=impl), want)
    same(run(info_nce_loss, views, 0.1, objective=objective, logq=torch.full((20,), -700.0), impl=impl), want)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_probabilities_far_apart(op_impl, objective, temperature):
    """exp(-logq) of 1e60 neither overflows nor loses the columns that remain."""
    logq = torch.where(torch.arange(30) % 3 == 0, -140.0, 0.0)
    compare_info_nce(op_impl, randn(2, 30, 8), temperature, objective=objective, logq=logq, cancels=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_probabilities_and_scores_that_balance(op_impl, objective):
    """Scores of 125 less logq of 104 count more than others: neither factor alone may be lost."""
    views = torch.nn.functional.normalize(randn(2, 30, 512), dim=-1)
    near = torch.arange(30) % 2 == 0
    views[:, near, 0] += 20
    logq = torch.where(near, 104.0, 0.0)
    compare_info_nce(op_impl, views, 0.008, objective=objective, logq=logq, cancels=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_one_sample_that_is_repeated(impl, objective):
    """Without any negative the loss is zero for one positive, and has no gradient that is not finite."""
    views = randn(2, 9, 8, dtype=F64)
    loss, grad, slope = run(info_nce_loss, views, 0.1, objective=objective, duplicates=torch.zeros(9).long(), impl=impl)
    for result in (loss, grad, slope):
        assert not result.any()


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_converged_rows_of_one_class(op_impl, temperature):
    """Where all positives are equal, the gradient is a small difference of large terms."""
    labels = torch.arange(60) // 4
    views = torch.nn.functional.normalize(randn(15, 16, seed=1), dim=-1)[labels] + 1e-3 * randn(2, 60, 16, seed=2)
    compare_info_nce(op_impl, views, temperature, objective="cross_view", labels=labels, cancels=True)


def test_unicl_as_it_is_published(impl):
    """arXiv:2204.03610, algorithm 1: soft cross entropy with targets that are equal for all pairs of one label."""
    labels = random_labels(40, 12)
    image, text = randn(2, 40, 8, dtype=F64).unbind(0)
    logits = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T / 0.1
    targets = (labels[:, None] == labels).double()
    targets = targets / targets.sum(-1, keepdim=True)
    loss = sum(torch.nn.functional.cross_entropy(x, targets) for x in (logits, logits.T)) / 2
    got = info_nce_loss([image, text], objective="cross_view", labels=labels, impl=impl)
    assert_within("loss", got, loss)


def test_sampled_softmax_of_a_two_tower_model(impl):
    """tensorflow-recommenders, tfrs.tasks.Retrieval: scores less log(candidate_sampling_probability), also the
    positive's, then a softmax over the candidates of each query."""
    query, item = randn(2, 30, 8, dtype=F64).unbind(0)
    probability = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.01
    scores = query @ item.T / 0.5 - probability.log()
    want = torch.nn.functional.cross_entropy(scores, torch.arange(30), reduction="none")
    logq = torch.stack([torch.zeros(30, dtype=F64), probability.log()])
    arguments = {"objective": "cross_view", "temperature": 0.5, "normalize": False, "reduction": "none", "impl": impl}
    assert_within("loss", info_nce_loss([query, item], logq=logq, **arguments)[0], want)


def test_accidental_hits(impl):
    """tensorflow-recommenders, remove_accidental_hits: candidates with the id of the positive are no negatives."""
    query, item = randn(2, 30, 8, dtype=F64).unbind(0)
    ids = random_labels(30, 10)
    scores = query @ item.T / 0.5
    hits = (ids[:, None] == ids) & ~torch.eye(30, dtype=torch.bool)
    want = torch.nn.functional.cross_entropy(scores.masked_fill(hits, -math.inf), torch.arange(30), reduction="none")
    arguments = {"objective": "cross_view", "temperature": 0.5, "normalize": False, "reduction": "none", "impl": impl}
    assert_within("loss", info_nce_loss([query, item], duplicates=ids, **arguments)[0], want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_any_integers_and_strides(impl, dtype):
    views, ids = randn(2, 12, 8), torch.arange(12) % 5
    want = info_nce_loss(views, duplicates=ids, impl=impl)
    assert torch.equal(info_nce_loss(views, duplicates=ids.to(dtype), impl=impl), want)
    strided = torch.stack([ids, -ids], 1).to(dtype)[:, 0]
    assert torch.equal(info_nce_loss(views, duplicates=strided, impl=impl), want)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_probabilities_that_are_none(impl, objective, value):
    logq = torch.zeros(12)
    logq[3] = value
    losses = info_nce_loss(randn(2, 12, 8), logq=logq, objective=objective, reduction="none", impl=impl)
    assert losses.isnan().all()


def test_a_common_offset_has_no_effect(impl):
    views, logq = randn(2, 12, 8), randn(12, dtype=F64, seed=3)
    want = info_nce_loss(views, logq=logq, impl=impl)
    assert_within("loss", info_nce_loss(views, logq=logq + 1e4, impl=impl), want.double(), floor=1e-9)


def test_the_module_passes_them_on(impl):
    views, ids, logq = randn(2, 12, 8), random_labels(12, 4), randn(12, seed=2)
    got = InfoNCELoss(0.2, impl=impl)(views, duplicates=ids, logq=logq)
    assert torch.equal(got, info_nce_loss(views, temperature=0.2, duplicates=ids, logq=logq, impl=impl))


def test_logq_has_no_gradient(impl):
    logq = randn(12, seed=2).requires_grad_()
    info_nce_loss(randn(2, 12, 8).requires_grad_(), logq=logq, impl=impl).backward()
    assert logq.grad is None


@pytest.mark.parametrize("objective", PAIRED_OBJECTIVES)
def test_threads_do_not_change_the_result(threads, objective):
    views, ids, logq = randn(3, 400, 16), random_labels(400, 90), randn(400, seed=2)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(info_nce_loss, views, 0.1, objective=objective, duplicates=ids, logq=logq, impl="cpu"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
