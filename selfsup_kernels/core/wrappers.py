"""What PyTorch wraps around a module: told by a wrapper's type and by its ``_modules``, never by an attribute.

Other libraries' wrappers (PEFT, Fabric) forward the attributes of the module inside: one that has a compiled module in
it has an ``_orig_mod``, too, and is something else.
"""

import sys

from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

CHILDREN = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"))
"""What torch.compile, activation checkpointing, FSDP1 and data parallelism call the module inside."""


def is_compiled(module) -> bool:
    """Whether ``module`` is what ``torch.compile`` made of one."""
    # Not imported here: who has compiled a module has imported it.
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return kind is not None and isinstance(module, kind)


def inner(module):
    """The module inside the wrappers of torch.compile and of data parallelism that have nothing of their own."""
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
    """Whether ``owner`` wraps its child ``child``, so that ``child`` is not part of the names of what is inside.

    A module that has anything else is no wrapper: without ``child`` its names could be those of another part.
    """
    if child not in CHILDREN or owner._parameters or owner._buffers or len(owner._modules) > 1:
        return False
    return child != "module" or isinstance(owner, PARALLEL)  # a name that people give, too
