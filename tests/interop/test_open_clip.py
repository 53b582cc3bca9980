"""Compare compat.open_clip with the installed open_clip."""

import pytest
import torch
import torch.nn.functional as F
from interop.helpers import assert_near, assert_same, run_processes, value_and_grads, views
from open_clip.loss import ClipLoss as Original
from open_clip.loss import SigLipLoss as OriginalSigLip

from selfsup_kernels.compat.open_clip import ClipLoss, SigLipLoss


def features(batch=64, dim=32):
    return [F.normalize(x, dim=-1) for x in views(batch, dim)]


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0, 2.0])
@pytest.mark.parametrize("batch", [64, 300])
def test_value_and_gradients_of_features_and_scale(batch, scale):
    assert_same(ClipLoss(), Original(), [*features(batch), torch.tensor(scale)])
    assert_same(lambda i, t: ClipLoss()(i, t, scale), lambda i, t: Original()(i, t, scale), features(batch))


def test_two_samples_against_the_original_in_float64():
    inputs = [*features(2), torch.tensor(1 / 0.07)]  # the loss is 7e-4; the original's float32 gradient is off by 5e-5
    got = value_and_grads(ClipLoss(), inputs)
    want = value_and_grads(Original(), [x.double() for x in inputs])
    assert_near("value", got[0], want[0])
    for i, (g, w) in enumerate(zip(got[1], want[1], strict=True)):
        assert_near(f"gradient {i}", g, w, floor=0)


@pytest.mark.parametrize("cache_labels", [False, True])
def test_a_bias_and_the_dictionary(cache_labels):
    def loss(of, bias):
        module = of(cache_labels=cache_labels)
        return lambda i, t, s, b: module(i, t, s, logit_bias=b if bias else None, output_dict=True)["contrastive_loss"]

    inputs = [*features(), torch.tensor(14.0), torch.tensor(-10.0)]
    for bias in (False, True):
        got, want = assert_same(loss(ClipLoss, bias), loss(Original, bias), inputs[: 3 + bias] + [None] * (not bias))
        assert (got[1][-1] is None) == (want[1][-1] is None)


def test_features_that_are_not_normalised():
    assert_same(ClipLoss(), Original(), [*views(64, 32), torch.tensor(0.5)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_at_least_as_near_as_the_original(dtype):
    inputs = [x.to(dtype) for x in (*features(), torch.tensor(14.0))]
    truth = Original()(*(x.double() for x in inputs)).item()
    ours, original = ClipLoss()(*inputs), Original()(*inputs)
    assert ours.dtype == original.dtype
    assert abs(ours.item() - truth) <= max(2 * abs(original.item() - truth), torch.finfo(dtype).eps * truth)


def _rank_features(rank, dtype=torch.float64):
    image, text = (F.normalize(x, dim=-1) for x in views(12, 8, dtype=torch.float64))
    rows = slice(4 * rank, 4 * rank + 4)
    return [image[rows].to(dtype), text[rows].to(dtype), torch.tensor(9.0, dtype=dtype)]


MODES = [(False, True), (True, True), (False, False)]
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5}


def _both(rank, world):
    """Return values and gradients of ours and the original by mode and dtype. Local losses weigh more on rank 1."""
    results = []
    for local_loss, gather_with_grad in MODES:
        weight = 1 + 0.5 * rank * local_loss
        modules = [of(local_loss, gather_with_grad, rank=rank, world_size=world) for of in (ClipLoss, Original)]
        for dtype in DTYPES:
            results += [
                value_and_grads(lambda *x, m=m, weight=weight: m(*x) * weight, _rank_features(rank, dtype))
                for m in modules
            ]
    return results


def test_two_processes():
    ranks = run_processes(2, _both)
    for mode in MODES:
        for dtype, bound in DTYPES.items():
            both = [(results.pop(0), results.pop(0)) for results in ranks]
            for rank, (got, want) in enumerate(both):
                where = f"rank {rank}, {mode}, {dtype}"
                assert_near(f"{where}: value", got[0], want[0], bound)
                assert_near(f"{where}: image", got[1][0], want[1][0], bound)
                assert_near(f"{where}: text", got[1][1], want[1][1], bound)
                if not mode[0]:
                    assert_near(f"{where}: scale", got[1][2], want[1][2], bound)
            scales = [sum(result[k][1][2] for result in both) / 2 for k in (0, 1)]
            assert_near(f"{mode}, {dtype}: scale", *scales, bound)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -15.0), (2.0, 3.0)])
@pytest.mark.parametrize("batch", [1, 64, 300])
def test_siglip_value_and_gradients(batch, scale, bias):
    inputs = [*features(batch), torch.tensor(scale), torch.tensor([bias])]
    assert_same(SigLipLoss(), OriginalSigLip(), inputs)
    assert_same(
        lambda i, t: SigLipLoss(cache_labels=True)(i, t, scale, None, output_dict=True)["contrastive_loss"],
        lambda i, t: OriginalSigLip(cache_labels=True)(i, t, scale, None, output_dict=True)["contrastive_loss"],
        features(batch),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_siglip_in_half_precision_is_at_least_as_near_as_the_original(dtype):
    inputs = [x.to(dtype) for x in (*features(), torch.tensor(14.0), torch.tensor(-10.0))]
    truth = OriginalSigLip()(*(x.double() for x in inputs)).item()
    ours, original = SigLipLoss()(*inputs), OriginalSigLip()(*inputs)
    assert ours.dtype == original.dtype
    assert abs(ours.item() - truth) <= max(2 * abs(original.item() - truth), torch.finfo(dtype).eps * truth)


DIST_IMPLS = ["bidir", "shift", "reduce", "gather"]


def _siglip_of_rank(rank, world):
    """Return values and gradients of ours and the original by ``dist_impl``. The loss weighs more on later ranks."""
    results = []
    image, text = (F.normalize(x, dim=-1) for x in views(3 * world, 8, dtype=torch.float64))
    rows = slice(3 * rank, 3 * rank + 3)
    inputs = [image[rows], text[rows], torch.tensor(9.0, dtype=torch.float64), torch.tensor(-4.0, dtype=torch.float64)]
    for dist_impl in DIST_IMPLS:
        for of in (SigLipLoss, OriginalSigLip):
            module = of(rank=rank, world_size=world, dist_impl=dist_impl)
            results.append(value_and_grads(lambda *x, m=module: m(*x) * (1 + 0.5 * rank), inputs))
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_siglip_in_several_processes(world):
    for rank, results in enumerate(run_processes(world, _siglip_of_rank)):
        for dist_impl in DIST_IMPLS:
            got, want = results.pop(0), results.pop(0)
            where = f"rank {rank} of {world}, {dist_impl}"
            assert_near(f"{where}: value", got[0], want[0], 1e-9, floor=0)
            for name, g, w in zip(("image", "text", "scale", "bias"), got[1], want[1], strict=True):
                assert_near(f"{where}: {name}", g, w, 1e-9, floor=0)
