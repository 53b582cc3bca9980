"""PyTorch's wrappers of modules, detected by type and ``_modules``, never by attribute.

Wrappers of other libraries (PEFT, Fabric) forward the attributes of the module inside: around a compiled module they
have an ``_orig_mod`` without being PyTorch's wrapper.
"""

import sys

from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

CHILDREN = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"))
"""The names that torch.compile, activation checkpointing, FSDP1 and data parallelism give the module inside."""


def is_compiled(module) -> bool:
    """Return True if ``torch.compile`` returned ``module``."""
    # Not imported here: compiling a module imports it.
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return kind is not None and isinstance(module, kind)


def inner(module):
    """Return the module inside torch.compile and data-parallel wrappers that hold nothing else."""
    while True:
        if isinstance(module, PARALLEL):
            child = "module"
        elif is_compiled(module):
            child = "_orig_mod"
        else:
            return module
        if not is_transparent(module, child):
            return module
        module = module._modules[child]


def is_transparent(owner: nn.Module, child: str) -> bool:
    """Return True if ``owner`` only wraps its child ``child``, so that names omit ``child``.

    A module that holds anything else is not a wrapper: without ``child`` its names could collide.
    """
    if child not in CHILDREN or owner._parameters or owner._buffers or len(owner._modules) > 1:
        return False
    return child != "module" or isinstance(owner, PARALLEL)  # users choose this name too
