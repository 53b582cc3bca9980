"""Export a pretrained encoder as the plain ``state_dict`` of a backbone."""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from selfsup_kernels.core.wrappers import inner as inner_module
from selfsup_kernels.ema.module import EMA
from selfsup_kernels.methods.siglip import SigLIP

NETWORKS = ("online", "target")
HEADS = ("fc", "classifier", "head", "heads", "head_dist", "last_linear")
"""The names that torchvision and timm give to classification heads."""
TOWERS = ("image_tower", "text_tower")
"""The names of SigLIP's encoders, by ``view``."""


def export_encoder(source, *, network="online", view=None, prefix=None, backbone=None, heads=HEADS):
    """Return the encoder's weights as a plain ``state_dict``, without the prefixes of wrappers and methods.

    ::

        state = sk.methods.export_encoder(method)                          # names as the encoder itself has them
        backbone = torchvision.models.resnet18()
        backbone.load_state_dict(sk.methods.export_encoder(method, backbone=backbone), strict=True)

    A leading ``module.`` (DataParallel, DistributedDataParallel) and every ``_orig_mod.`` (``torch.compile``) are
    removed from the names. Only the encoder is kept from a method's or trainer's checkpoint.

    Args:
        source: a method, an :class:`selfsup_kernels.EMA`, an encoder, or a ``state_dict`` that holds one of them under
            any prefix (the ``"state_dict"`` of a Lightning checkpoint is found).
        network: ``"online"``, or ``"target"`` for the moving average of a method that has one.
        view: the index of the view's encoder if every view has its own (:class:`CMC`), 0 for the image and 1 for the
            text tower of :class:`SigLIP`; None if all views share one.
        prefix: the prefix of the encoder's names in a ``state_dict``; None to detect it.
        backbone: the module that will load the result, which then has exactly this module's names and shapes. Heads
            that the encoder lacks (``fc`` replaced by ``nn.Identity``), or has with another number of classes, are
            taken from the backbone; heads that the backbone lacks are dropped; the numeric names of
            ``nn.Sequential(*list(resnet.children())[:-1])`` become the names of the backbone's children.
        heads: the names of the backbone's children that count as heads.

    Returns:
        An ``OrderedDict`` of detached copies, on the device of the weights.

    Raises:
        TypeError: ``source`` or ``backbone`` has another type.
        ValueError: the source has no such network, the encoder's prefix is ambiguous, or names or shapes outside the
            heads do not fit the backbone.

    Example:
        >>> method = sk.methods.SimCLR(nn.Linear(64, 32), nn.Linear(32, 16))
        >>> sorted(sk.methods.export_encoder(method))
        ['bias', 'weight']
    """
    if network not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, got {network!r}")
    if isinstance(source, nn.Module):
        if prefix is not None:
            raise ValueError("prefix: expected None for a module; it is for a state_dict")
        state = _encoder_of(source, network, view).state_dict()
    elif isinstance(source, Mapping):
        state = _encoder_state(source, network, view, prefix)
    else:
        raise TypeError(f"source: expected a module or a state_dict, got {type(source).__name__}")
    state = OrderedDict((name.replace("_orig_mod.", ""), value) for name, value in state.items())
    if backbone is not None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone: expected an nn.Module, got {type(backbone).__name__}")
        state = _fit(state, inner_module(backbone), tuple(heads))
    return OrderedDict((k, v.detach().clone() if isinstance(v, torch.Tensor) else v) for k, v in state.items())


def _encoder_of(module, network, view) -> nn.Module:
    module = inner_module(module)
    if isinstance(module, EMA):
        module = module.module
    elif network == "target":
        if not isinstance(getattr(module, "target", None), EMA):
            raise ValueError(f"network: expected 'online', since {type(module).__name__} has no target network")
        module = module.target.module
    if isinstance(module, SigLIP):
        module = getattr(module, _tower(view))
    elif isinstance(getattr(module, "projector", None), nn.Module) and hasattr(module, "encoder"):
        module = module.encoder
        if isinstance(module, nn.ModuleList):
            if view not in range(len(module)):
                raise ValueError(f"view: expected an encoder's index, an integer in [0, {len(module)}), got {view!r}")
            module = module[view]
        elif view is not None:
            raise ValueError(f"view: expected None, since all views have one encoder, got {view!r}")
    return inner_module(module)


def _tower(view) -> str:
    if view not in range(2):
        raise ValueError(f"view: expected 0 for the image tower or 1 for the text tower, got {view!r}")
    return TOWERS[view]


def _encoder_state(state, network, view, prefix):
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if prefix is None:
        state = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in state.items()}
        prefix = _find_prefix(state, network, view)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = OrderedDict((name[len(prefix) :], value) for name, value in state.items() if name.startswith(prefix))
    if not found:
        raise ValueError(f"prefix: expected names that start with {prefix!r}, got {_some(state)}")
    return OrderedDict((re.sub(r"^(module\.)+", "", name), value) for name, value in found.items())


def _find_prefix(state, network, view) -> str:
    """Return the prefix of the encoder's names: next to a projector, inside ``online.`` or ``target.module.``, or that
    of a tower."""
    prefixes = {""} if all(name.startswith("encoder.") for name in state) else set()
    for name in state:
        for pattern in (r"((?:.*?\.)??)projector\.", r"((?:.*?\.)??(?:online|target\.module)\.)encoder\."):
            match = re.match(pattern, name)
            if match:
                prefixes.add(match[1])
    targets = {p for p in prefixes if re.search(r"(^|\.)target\.module\.$", p)}
    candidates = targets if network == "target" else prefixes - targets
    candidates = {p for p in candidates if any(name.startswith(f"{p}encoder.") for name in state)}
    if network == "target" and not candidates:
        raise ValueError("network: expected a state_dict with target.module.encoder. and target.module.projector.")
    pairs = set()
    if network == "online":
        pairs = {match[1] for name in state if (match := re.match(r"((?:.*?\.)??)(?:image|text)_tower\.", name))}
    # An encoder may itself consist of two towers, and a tower of an encoder and a projector: the outer one counts.
    pairs = {p for p in pairs if not p.startswith(tuple(f"{c}encoder." for c in prefixes))}
    candidates = {c for c in candidates if not c.startswith(tuple(f"{p}{tower}." for p in pairs for tower in TOWERS))}
    if not candidates | pairs:
        return ""
    if len(candidates) + len(pairs) > 1:
        choices = ", ".join(sorted(candidates | pairs))
        raise ValueError(f"prefix: expected to be told which of {choices} precedes {'the ' * bool(pairs)}encoder.")
    if pairs:
        return f"{pairs.pop()}{_tower(view)}."
    found = f"{candidates.pop()}encoder."
    return found if view is None else f"{found}{view}."


def _fit(state, backbone, heads):
    """Return ``state`` with exactly the names and shapes of ``backbone``."""
    wanted = backbone.state_dict()
    first = {name.split(".")[0] for name in state}
    if all(part.isdigit() for part in first) and not first <= {name.split(".")[0] for name in wanted}:
        state = _named_by_position(state, backbone)
    fitted, problems = OrderedDict(), []
    for name, own in wanted.items():
        value = state.get(name)
        shape, expected = (tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in (value, own))
        if name in state and shape == expected:
            fitted[name] = value
        elif name.split(".")[0] in heads:
            fitted[name] = own
        elif name in state:
            problems.append(f"{name} is {shape}, expected {expected}")
        else:
            problems.append(f"{name} is missing")
    for name in state:
        # torchvision's FrozenBatchNorm2d has no num_batches_tracked.
        if name not in wanted and name.split(".")[0] not in heads and not name.endswith(".num_batches_tracked"):
            problems.append(f"{name} is unexpected")
    if problems:
        raise ValueError(f"backbone: expected one that the encoder's weights fit; {_some(problems, '; ')}")
    return fitted


def _named_by_position(state, backbone):
    names = [name for name, _ in backbone.named_children()]
    renamed = OrderedDict()
    for name, value in state.items():
        number, _, rest = name.partition(".")
        place = names[int(number)] if int(number) < len(names) else number
        renamed[f"{place}.{rest}"] = value
    return renamed


def _some(names, separator=", ") -> str:
    names = list(names)
    return separator.join(names[:5]) + (f"{separator}and {len(names) - 5} more" if len(names) > 5 else "") or "none"
