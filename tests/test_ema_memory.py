"""ema_update_ and the memory of its tensors: previously accepted lists, memory formats, columns."""

import pytest
import torch
from helpers import randn

import selfsup_kernels as sk


def _first_then(impl, first, second, error):
    """The second call has the addresses of the first, accepted one, but other shapes, strides or dtypes."""
    sk.ema_update_(*first(), 0.5, impl=impl)
    targets, sources = second()
    before = [t.clone() for t in targets]
    with pytest.raises(error):
        sk.ema_update_(targets, sources, 0.5, impl=impl)
    for t, old in zip(targets, before, strict=True):
        assert torch.equal(t, old)


def test_a_changed_list_at_the_same_addresses_is_checked_again(impl):
    b, s = torch.zeros(6), torch.arange(6.0)
    _first_then(
        impl,
        lambda: ([b.view(2, 3)], [s.view(2, 3)]),
        lambda: ([b.view(3, 2)], [s.view(2, 3)]),
        ValueError,
    )
    m = torch.arange(16.0).view(4, 4)
    _first_then(impl, lambda: ([m[0]], [m[1]]), lambda: ([m[:, 0]], [m[1]]), RuntimeError)
    p, q = torch.zeros(4, 4), torch.ones(4, 4)
    _first_then(impl, lambda: ([p], [q]), lambda: ([p.as_strided_((4, 4), (1, 1))], [q]), RuntimeError)
    x, y = torch.zeros(4), torch.ones(4)
    _first_then(impl, lambda: ([x], [y]), lambda: ([x.view(torch.int32)], [y]), TypeError)


def test_a_target_transposed_in_place(impl):
    t, s = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    sk.ema_update_([t], [s], 0.0, impl=impl)
    with pytest.raises(ValueError, match="shape"):
        sk.ema_update_([t.t_()], [s], 0.0, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_differ(impl, dtype):
    """A model moved to channels_last after its EMA was created, a column of a matrix, a transposed source."""
    shape = (8, 6, 3, 5)
    source = randn(*shape, seed=1).to(dtype)
    wide = randn(16, 3)
    for target, other in (
        (randn(*shape).to(memory_format=torch.channels_last), source),
        (randn(*shape), source.to(memory_format=torch.channels_last)),
        (wide[:, 1], randn(16, seed=2).to(dtype)),
        (randn(7, 9), randn(9, 7, seed=3).to(dtype).t()),
    ):
        strides, untouched = target.stride(), wide[:, 0].clone()
        want = torch.lerp(target.double(), other.double(), 0.25)
        sk.ema_update_([target], [other], 0.75, impl=impl)
        assert target.stride() == strides
        torch.testing.assert_close(target.double(), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(wide[:, 0], untouched)
