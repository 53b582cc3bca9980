"""Detect tensors that share memory: exact, without reading values, and cheap if nothing is shared.

An in-place update of many tensors at once is only defined if no destination shares memory with another tensor that is
written or read. Addresses, shapes and strides determine this. ``bounds`` and a sort settle the usual case; if the
address ranges of two tensors overlap (columns of one matrix, for example), ``shares_memory`` decides exactly.
"""

import torch


def bounds(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address range [first, last) of a non-empty tensor."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two tensors are the same elements of the same memory in the same order."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
    )


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two non-empty tensors have a byte in common."""
    # A common byte is a solution of  a + sum i_k s_k = b + sum j_k t_k  with i, j in range, where the bytes of an
    # element are one more dimension of stride 1. Counting j from the far end makes every term positive.
    own, other = _terms(a), _terms(b)
    goal = b.data_ptr() - a.data_ptr() + sum(stride * most for stride, most in other)
    return _reachable(own + other, goal)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return True if two elements of a tensor share memory, as in an expanded tensor."""
    dims = sorted((stride, n - 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    extent = 0
    for stride, most in dims:
        if stride <= extent:
            break
        extent += stride * most
    else:
        return False  # nested strides: every dimension steps over all smaller ones
    if dims[0][0] == 0:
        return True
    # Two elements coincide if sum d_k s_k = 0 for differences d_k in [-most_k, most_k], not all 0. Let d_k be the last
    # nonzero difference: by symmetry it is positive, and the earlier ones must cancel its term.
    for k, (stride, most) in enumerate(dims):
        rest = dims[:k]
        goal = stride * most + sum(s * m for s, m in rest)
        if _reachable([(stride, most - 1)] + [(s, 2 * m) for s, m in rest], goal):
            return True
    return False


def _terms(tensor):
    size = tensor.element_size()
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return [(stride * size, n - 1) for n, stride in dims if n > 1 and stride > 0] + [(1, size - 1)]


_MOST_SUMS = 100_000


def _reachable(terms, goal) -> bool:
    """Return True if ``sum stride_k * x_k = goal`` has a solution in integers ``0 <= x_k <= most_k``.

    Processes large strides first and keeps only partial sums that the smaller strides can complete, which are few for
    the strides of real tensors. If there are too many, returns True, so that the update is refused.
    """
    merged: dict[int, int] = {}
    for stride, most in terms:
        merged[stride] = merged.get(stride, 0) + most
    rest = sum(stride * most for stride, most in merged.items())
    left = {goal}
    for stride, most in sorted(merged.items(), reverse=True):
        rest -= stride * most
        following = set()
        for value in left:
            low, high = max(0, -((rest - value) // stride)), min(most, value // stride)
            if len(following) + high - low > _MOST_SUMS:
                return True
            following.update(value - stride * x for x in range(low, high + 1))
        left = following
    return 0 in left
