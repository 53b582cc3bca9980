"""Copy models that ``copy.deepcopy`` refuses, and restore a module after a failed load."""

import contextlib
import copy
import sys
import types

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_kernels.core.lazy import is_fake

_ATOMIC = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, str, bytes, int, float, complex)


def copy_of(model: nn.Module) -> nn.Module:
    """Return ``copy.deepcopy(model)``, also if the model holds handles or non-leaf tensors.

    Process groups, device meshes, streams, events and the mode of FakeTensors are shared: they refer to something
    outside the model. Tensors with autograd history (a layer's last output, the weight that ``nn.utils.weight_norm``
    computes before every forward) are copied without it.
    """
    memo = {}
    handles = _handles()
    seen, ahead = {}, [model]  # id -> object: keeping objects alive keeps their ids unique
    while ahead:
        value = ahead.pop()
        if id(value) in seen or isinstance(value, _ATOMIC):
            continue
        seen[id(value)] = value
        if isinstance(value, handles):
            memo[id(value)] = value
        elif isinstance(value, torch.Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif is_fake(value):  # its __deepcopy__ needs memory
                copied = value.detach().clone()
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(copied, value.requires_grad) if is_parameter else copied
            ahead.append(vars(value))
        elif isinstance(value, types.MethodType):  # a hook
            ahead.append(value.__self__)
        elif isinstance(value, dict):
            ahead += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            ahead += value
        elif isinstance(getattr(value, "__dict__", None), dict):
            ahead.append(vars(value))
    with torch.no_grad():  # else the copy of a scripted module has autograd history
        return copy.deepcopy(model, memo)


@contextlib.contextmanager
def unchanged_on_error(module: nn.Module, *, values: bool):
    """Restore the tensors and the extra state of a module if the body raises.

    Args:
        values: True if the body may write to the tensors, so their values are saved; False if it only replaces tensors.
    """
    owned = [(named, dict(named.items())) for m in module.modules() for named in (m._parameters, m._buffers)]
    tensors = {id(x): x for _, before in owned for x in before.values() if x is not None}
    swapped = not values and torch.__future__.get_swap_module_params_on_conversion()
    filled = [x for x in tensors.values() if not nn.parameter.is_lazy(x)]
    kept = [(x, x.detach().clone()) for x in filled] if values else []
    memory = [(x, x.detach()) for x in filled] if swapped else []
    extra = [(m, copy.deepcopy(m.get_extra_state())) for m in module.modules() if _has_extra_state(type(m))]
    try:
        yield
    except BaseException:
        for named, before in owned:
            for name in [name for name in named.keys() if name not in before]:  # noqa: SIM118 (of scripted modules)
                del named[name]
            for name, tensor in before.items():
                if named[name] is not tensor:
                    named[name] = tensor
        for tensor, value in memory:
            tensor.data = value
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for owner, state in extra:
            owner.set_extra_state(state)
        raise


def _has_extra_state(kind: type) -> bool:
    return all(getattr(kind, name) is not getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state"))


def _handles() -> tuple[type, ...]:
    """Return the types that copies share. Without an imported torch.distributed module, there are no objects of it."""
    found = [torch.Stream, torch.Event, torch.cuda.Stream, torch.cuda.Event, TorchDispatchMode]
    for module, name in (
        ("torch.distributed", "ProcessGroup"),
        ("torch.distributed", "Store"),
        ("torch.distributed.device_mesh", "DeviceMesh"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            found.append(kind)
    return tuple(found)
