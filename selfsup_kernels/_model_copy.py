"""Copies of models that hold what ``copy.deepcopy`` refuses."""

import copy
import sys
import types

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATOMIC = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, str, bytes, int, float, complex)


def copy_of(model: nn.Module) -> nn.Module:
    """``copy.deepcopy(model)``, whatever handles and results of computations the model keeps.

    Process groups and device meshes, streams and events, and the mode of FakeTensors are shared: they stand for
    something outside of the model. Tensors with a history of autograd (a layer's last output, the weight that
    ``nn.utils.weight_norm`` computes before every forward) are copied without it.
    """
    memo = {}
    handles = _handles()
    seen, ahead = {}, [model]  # by id, and the objects: so that no other one gets the id of one that is gone
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
            elif isinstance(value, FakeTensor):  # its own __deepcopy__ looks for memory
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
    with torch.no_grad():  # the copy of a scripted module would have a history that leads to the module
        return copy.deepcopy(model, memo)


def _handles() -> tuple[type, ...]:
    """The types that are shared. Who has an object of torch.distributed has imported its module."""
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
