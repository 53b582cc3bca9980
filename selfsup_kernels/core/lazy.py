"""Features of ``torch._dynamo`` and ``torch._subclasses`` without their import, which takes as long as torch's own."""

import sys

import torch


def constant(function):
    """Mark a function like ``torch.compiler.assume_constant_result``: ``torch.compile`` runs it during tracing and
    treats its result as a constant."""
    function._dynamo_marked_constant = True
    return function


def is_fake(tensor: torch.Tensor) -> bool:
    """Return True for a FakeTensor, which has no memory. If its module is not imported, there are none."""
    kind = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return kind is not None and isinstance(tensor, kind)
