"""What the library uses of ``torch._dynamo`` and ``torch._subclasses`` without importing them.

Their import takes as long as that of the rest of torch.
"""

import sys

import torch


def constant(function):
    """``torch.compiler.assume_constant_result``: while ``torch.compile`` traces, the function runs, and its result is a
    constant of the graph."""
    function._dynamo_marked_constant = True
    return function


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a FakeTensor, which has a shape and no memory. Whoever made one has imported the class."""
    kind = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return kind is not None and isinstance(tensor, kind)
