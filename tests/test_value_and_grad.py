"""``info_nce_value_and_grad`` gives what the loss and its backward give; tests/test_siglip.py has SigLIP's."""

import pytest
import torch
import torch.distributed as dist
from helpers import IMPLS, LOW_PRECISION, randn, random_labels

import selfsup_kernels as sk
from selfsup_kernels.core.ops import accumulation_dtype
from selfsup_kernels.info_nce.objectives import LABEL_OBJECTIVES, OBJECTIVES

DTYPES = [torch.float64, torch.float32, *LOW_PRECISION]
SIZES = (3, 8)


def by_backward(views, temperature, **arguments):
    """Return the loss and the gradients of a stacked tensor and of the temperature."""
    views = views.detach().clone().requires_grad_()
    temperature = torch.tensor(temperature, dtype=accumulation_dtype(views.dtype), requires_grad=True)
    loss = sk.info_nce_loss(views, temperature=temperature, **arguments)
    return loss.detach(), *torch.autograd.grad(loss, (views, temperature))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_the_gradient_of_the_loss(op_impl, objective, dtype, reduction):
    views = randn(3, 9, 5, dtype=dtype)
    labels = random_labels(9, 4) if objective in LABEL_OBJECTIVES else None
    arguments = {"objective": objective, "labels": labels, "reduction": reduction, "impl": op_impl}
    want = by_backward(views, 0.3, **arguments)
    got = sk.info_nce_value_and_grad(views.requires_grad_(), temperature=0.3, **arguments)
    assert [t.dtype for t in got] == [dtype, dtype, accumulation_dtype(dtype)]
    assert not any(t.requires_grad for t in got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))
    loss, grads, _ = sk.info_nce_value_and_grad(
        list(views), temperature=torch.tensor([0.3], dtype=torch.float64), **arguments
    )
    assert torch.equal(loss, got[0])
    torch.testing.assert_close(torch.stack(grads), got[1])


def test_a_queue_and_inference_mode(impl):
    with torch.inference_mode():
        views, queue = randn(2, 4, 5), randn(6, 5, seed=1)
        got = sk.info_nce_value_and_grad(views[:, :1], temperature=0.2, queue=queue, impl=impl)
    want = by_backward(views.clone()[:, :1], 0.2, queue=queue.clone(), impl=impl)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def in_a_group(group, impl, labelled):
    views = randn(2, sum(SIZES), 6, dtype=torch.float64).split(SIZES, 1)[dist.get_rank(group)]
    labels = random_labels(sum(SIZES), 4).split(SIZES)[dist.get_rank(group)] if labelled else None
    arguments = {"labels": labels, "group": group, "impl": impl}
    return sk.info_nce_value_and_grad(views, temperature=0.2, **arguments), by_backward(views, 0.2, **arguments)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_several_processes(ranks, impl, labelled):
    for got, want in ranks.run(2, in_a_group, impl, labelled):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^reduction: expected one of mean, sum, got 'none'"):
        sk.info_nce_value_and_grad(randn(2, 4, 5), reduction="none")
    with pytest.raises(ValueError, match=r"^views: expected at least 2 samples"):
        sk.info_nce_value_and_grad(randn(2, 1, 5))
    with pytest.raises(ValueError, match=r"^temperature: expected a finite number > 0"):
        sk.info_nce_value_and_grad(randn(2, 4, 5), temperature=-1)
