"""Backward of a loss over a batch whose activations do not fit in memory: gradient caching (arXiv:2101.06983)."""

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained

Tensor = torch.Tensor


@explained("chunked_backward(encoder, views, criterion, chunk_size=64)")
def chunked_backward(encoder, views, loss, chunk_size, *, scaler=None, backward=None, modules=()):
    r"""Compute the loss of a whole batch and its gradients, with the activations of only one chunk in memory.

    Gradient caching (arXiv:2101.06983): encode every chunk without a graph; compute the loss of all embeddings and its
    gradient with respect to them; then encode every chunk again with a graph and backpropagate its part of that
    gradient. The cost is a second forward of the encoder. Instead of
    ``criterion([encoder(x) for x in views]).backward()``::

        criterion = sk.InfoNCELoss(0.07)
        value = sk.chunked_backward(encoder, views, criterion, chunk_size=64)
        optimizer.step()
        optimizer.zero_grad()

    Gradients are added to ``.grad`` as by ``backward()``, including those of the loss' own parameters (a learnable
    temperature). They are exact up to the order of summation if the encoder treats samples independently.

    The second forward repeats the first:

    - Random numbers: each chunk starts from the same states of the CPU and accelerator generators both times, so
      dropout masks are equal. Afterwards the generators are in the state that the loss left. Python's, NumPy's and your
      own generators are not replayed.
    - Buffers (BatchNorm's running statistics) are restored before the second forward and updated in the same order, so
      each chunk updates them once. In training mode BatchNorm takes mean and variance over a *chunk*: the loss then
      differs from that of the whole batch, but its gradient is still exact.
    - Autocast: call this function inside it. Both forwards and the loss run under it, the backward passes do not.

    With DistributedDataParallel pass the wrapped module as ``encoder``: all chunks run in ``no_sync()``, then one pass
    through the wrapper reduces the gradients of all parameters, whichever chunks trained them. An outer ``no_sync()``
    is respected. Give the loss a ``group=`` to make it the loss of the global batch. Processes may have different
    numbers of samples and chunks (except with FSDP and ``nn.SyncBatchNorm``, which communicate in every chunk). The
    loss' parameters are outside the wrapped module: average their gradients yourself.

    Args:
        encoder: a module or function that maps a chunk of one view to a tensor with one row per sample, or a sequence
            of one per view.
        views: a sequence of inputs, one per view, or one ``(V, B, ...)`` tensor of ``V`` views. Except for 0-dim
            tensors, every tensor in a view has the samples in its first dimension and is split into chunks. A tensor is
            passed as ``encoder(x)``, a tuple or list as ``encoder(*x)``, a mapping as ``encoder(**x)``; nested tensors
            are split too.
        loss: a function from the list of embeddings, one ``(B, D)`` tensor per view, to a tensor of one element: a
            module such as :class:`selfsup_kernels.InfoNCELoss`, or a lambda.
        chunk_size: samples per chunk, or a sequence of one number per view.
        scaler: a ``torch.amp.GradScaler``; the gradients are then those of the scaled loss.
        backward: a function to call instead of ``loss.backward()``: Lightning's ``self.manual_backward``,
            ``fabric.backward``, ``accelerator.backward``, ``lambda loss: (loss / 4).backward()``.
        modules: the modules that an ``encoder`` which is a plain function uses: their buffers are restored, and
            DistributedDataParallel modules among them are synchronised once. Not needed if the encoder is a module, a
            module's method, or a partial of these.

    Returns:
        The loss, detached and unscaled. Its backward pass is done: do not call ``.backward()`` on it.

    Raises:
        ValueError, TypeError: an argument, or a result of the encoder or the loss, does not fit; the message says why.
        RuntimeError: gradients are disabled (``torch.no_grad()``); nothing trainable was reached, where
            ``loss.backward()`` would raise too; a DistributedDataParallel module is used in a way that does not work
            with chunks (``static_graph=True``, ``mixed_precision=``, ``join()``, a call inside its forward).

    Example:
        >>> encoder, criterion = nn.Linear(64, 32), sk.InfoNCELoss(0.1)
        >>> x1, x2 = torch.randn(2, 256, 64)
        >>> loss = sk.chunked_backward(encoder, [x1, x2], criterion, chunk_size=64)
        >>> encoder.weight.grad.shape
        torch.Size([32, 64])
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("chunked_backward: expected gradients to be on, got a call under torch.no_grad()")
    if scaler is not None and backward is not None:
        raise ValueError("backward: expected None together with scaler")
    streams = _streams(encoder, views, chunk_size, modules)
    chunks = [chunk for stream in streams for chunk in stream.chunks()]
    devices = _accelerators(streams)
    replicas = _replicas(streams)
    _check_counts(streams, devices)
    buffers = _Buffers(streams)
    try:
        with torch.no_grad():
            embeddings = _embed(streams, chunks, devices)
    finally:
        buffers.rewind()

    value = loss(embeddings)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a function that returns a tensor of one element, got {got}")
    with _Hooks(streams) as hooks:
        with _no_autocast(devices):
            if backward is not None:
                backward(value)
            else:
                (value if scaler is None else scaler.scale(value)).backward()
        with contextlib.ExitStack() as stack:
            for replica in replicas:
                stack.enter_context(replica.no_sync())
            missed = _encode_again([c for c in chunks if not c.stream.frozen], embeddings, devices)
        gradients = hooks.collect()
        for replica in replicas:
            _synchronise(replica, gradients)
        if gradients:
            _Deliver.apply(list(gradients.values()), *gradients).backward()
    if missed and not _reaches_others(value, embeddings):
        raise RuntimeError(
            "encoder: expected rows that require grad, got none in any chunk: all its parameters are frozen, or it "
            "runs under no_grad, or under reentrant checkpointing of inputs that do not require grad "
            "(element 0 of tensors does not require grad)"
        )
    return value.detach()


@dataclass
class _Stream:
    """One view: its encoder, its inputs, and the modules that encode it."""

    view: int
    encoder: object
    inputs: object
    size: int  # of a chunk
    modules: list[nn.Module]
    samples: int = field(init=False)
    trained: list[Tensor] = field(init=False)
    frozen: bool = field(init=False)  # nothing to train: encoded once

    def __post_init__(self):
        tensors = [t for t in _tensors(self.inputs) if t.dim()]
        if not tensors:
            raise ValueError(f"views[{self.view}]: expected tensors with the samples as first dimension, got none")
        self.samples = len(tensors[0])
        for tensor in tensors:
            if len(tensor) != self.samples or not self.samples:
                raise ValueError(
                    f"views[{self.view}]: expected tensors of one length >= 1, got {sorted({len(t) for t in tensors})}"
                )
        leaves = [p for m in self.modules for p in m.parameters()] + tensors
        self.trained = [t for t in leaves if t.requires_grad and t.is_leaf]
        self.frozen = _is_known(self.encoder) and not any(t.requires_grad for t in leaves)

    def chunks(self):
        return [_Chunk(self, slice(i, min(i + self.size, self.samples))) for i in range(0, self.samples, self.size)]


@dataclass
class _Chunk:
    stream: _Stream
    rows: slice
    random_states: list = field(default_factory=list)

    def encode(self) -> Tensor:
        x, encoder, count = self.stream.inputs, self.stream.encoder, self.rows.stop - self.rows.start
        x = _take(x, self.rows)
        if isinstance(x, Mapping):
            rows = encoder(**x)
        elif isinstance(x, (tuple, list)):
            rows = encoder(*x)
        else:
            rows = encoder(x)
        if not isinstance(rows, Tensor):
            raise TypeError(f"encoder: expected one that returns a tensor, got {type(rows).__name__}")
        if not rows.dim() or len(rows) != count:
            raise ValueError(f"encoder: expected {count} rows for a chunk of {count}, got shape {tuple(rows.shape)}")
        return rows


def _streams(encoder, views, chunk_size, modules) -> list[_Stream]:
    if isinstance(views, Tensor):
        if views.dim() < 2:
            raise ValueError(f"views: expected a (V, B, ...) tensor or a sequence, got shape {tuple(views.shape)}")
        views = views.unbind()
    if isinstance(views, (Mapping, str)) or not isinstance(views, Sequence):
        raise TypeError(
            f"views: expected a (V, B, ...) tensor or a sequence of one input per view, got {type(views).__name__}"
        )
    if not views:
        raise ValueError("views: expected at least one, got 0")
    encoders = list(encoder) if isinstance(encoder, (tuple, list, nn.ModuleList)) else [encoder] * len(views)
    sizes = list(chunk_size) if isinstance(chunk_size, (tuple, list)) else [chunk_size] * len(views)
    for name, values in (("encoder", encoders), ("chunk_size", sizes)):
        if len(values) != len(views):
            raise ValueError(f"{name}: expected one, or {len(views)}, one per view, got {len(values)}")
    for function in encoders:
        if not callable(function):
            raise TypeError(f"encoder: expected a module or a function, got {type(function).__name__}")
    sizes = [check.integer("chunk_size", size, 1) for size in sizes]
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    return [
        _Stream(v, f, x, size, list(dict.fromkeys(_modules_behind(f) + modules)))
        for v, (f, x, size) in enumerate(zip(encoders, views, sizes, strict=True))
    ]


def _modules_behind(function) -> list[nn.Module]:
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        inside = [function.func, *function.args, *function.keywords.values()]
        return [m for f in inside for m in _modules_behind(f)]
    owner = getattr(function, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def _is_known(function) -> bool:
    """Return True if all trainable tensors are in known modules: a module, its method, or a partial of these."""
    if isinstance(function, functools.partial):
        bound = _tensors([function.args, function.keywords])
        return _is_known(function.func) and not any(t.requires_grad for t in bound)
    return isinstance(getattr(function, "__self__", function), nn.Module)


def _embed(streams, chunks, devices) -> list[Tensor]:
    """Return all rows of each view as leaves of the loss' graph; every chunk records its random states."""
    parts: dict[int, list[Tensor]] = {}
    for chunk in chunks:
        chunk.random_states = _random_states(devices)
        rows = chunk.encode()
        if not rows.is_floating_point():
            raise TypeError(f"encoder: expected one that returns floating rows, got {rows.dtype}")
        parts.setdefault(chunk.stream.view, []).append(rows)
    return [torch.cat(parts[s.view]).requires_grad_(not s.frozen) for s in streams]


def _encode_again(chunks, embeddings, devices) -> bool:
    """Run each chunk's forward with a graph, and its backward.

    Returns True if there were gradients but no rows that require grad.
    """
    given = taken = False
    idle = {}  # modules whose forward no backward follows
    after = _random_states(devices)
    try:
        for chunk in chunks:
            _set_random_states(chunk.random_states, devices)
            grad = embeddings[chunk.stream.view].grad
            # A view that the loss does not use is encoded only to update buffers: its parameters keep a grad of None.
            with torch.set_grad_enabled(grad is not None):
                rows = chunk.encode()
            given |= grad is not None
            if rows.requires_grad and grad is not None:
                taken = True
                with _no_autocast(devices):
                    rows.backward(grad[chunk.rows])
            else:
                idle |= dict.fromkeys(chunk.stream.modules)
    finally:
        _set_random_states(after, devices)
    for module in _submodules(idle):
        if isinstance(module, _fsdp("FSDPModule")):
            module.reshard()  # back from gathered parameters to the shards
    return given and not taken


def _reaches_others(value, embeddings) -> bool:
    """Return True if the loss depends on trainable leaves other than the embeddings."""
    nodes = seen = {value.grad_fn} - {None}
    while nodes:
        nodes = {n for node in nodes for n, _ in node.next_functions if n is not None} - seen
        seen = seen | nodes
    leaves = [node.variable for node in seen if hasattr(node, "variable")]
    return any(all(leaf is not e for e in embeddings) for leaf in leaves)


def _submodules(modules) -> dict[nn.Module, None]:
    return dict.fromkeys(m for outer in modules for m in outer.modules())


def _fsdp(name) -> type | tuple:
    """Return a class of torch.distributed.fsdp for isinstance, or an empty tuple if that was never imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def _replicas(streams) -> list[DistributedDataParallel]:
    """Return the encoders' DistributedDataParallel modules; raise if one cannot be synchronised after the chunks."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "chunked_backward: expected a call outside of the forward of a DistributedDataParallel module, which would "
            "not synchronise the gradients; wrap the encoder in it instead"
        )
    replicas = [m for m in _submodules(m for s in streams for m in s.modules) if isinstance(m, DistributedDataParallel)]
    for replica in replicas:
        for name, used, reason in (
            ("static_graph=True", replica.static_graph, "it expects equally many backward passes in each step"),
            ("mixed_precision=", replica.mixed_precision, "its casts last from a forward to the backward that reduces"),
            ("join()", replica._join_config.enable, "it counts forward passes, and processes differ in their chunks"),
        ):
            if used:
                raise RuntimeError(
                    f"encoder: expected DistributedDataParallel without {name}, got one with it: {reason}"
                )
    return replicas


def _check_counts(streams, devices) -> None:
    """Raise if the processes' chunk counts differ while modules communicate in every forward: they would hang."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    groups, sharded = {}, _fsdp("FullyShardedDataParallel")
    for module in _submodules(m for s in streams for m in s.modules):
        if isinstance(module, sharded) or (isinstance(module, nn.SyncBatchNorm) and module.training):
            groups[module.process_group or dist.group.WORLD] = None
        for p in module.parameters(recurse=False):
            groups |= dict.fromkeys(p.device_mesh.get_all_groups() if hasattr(p, "device_mesh") else ())
    if not groups:
        return
    counts = [-(-s.samples // s.size) for s in streams]
    extremes = torch.tensor([counts, [-c for c in counts]], device=devices[0] if devices else "cpu")
    for group in groups:
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    most, least = extremes.tolist()
    if most != [-c for c in least]:
        raise ValueError(
            f"chunk_size: expected as many chunks in each process, since FSDP, DTensor and SyncBatchNorm communicate "
            f"in every chunk; got {counts} here, and up to {most}"
        )


def _synchronise(replica, gradients) -> None:
    """Run DistributedDataParallel's forward and backward over all its parameters, to reduce the chunks' gradients.

    Processes may have trained different parameters, so the pass covers all of them; a parameter that no process trained
    keeps a gradient of None. ``gradients`` holds the gradients not yet given to parameters with hooks.
    """
    if not replica.require_backward_grad_sync:  # an outer no_sync()
        return
    parameters = list(replica.module.parameters())
    trained = torch.tensor([p.grad is not None or p in gradients for p in parameters], device=replica.device).int()
    dist.all_reduce(trained, dist.ReduceOp.MAX, replica.process_group)
    if not trained.any():
        return
    leaves = [p for p in parameters if p.requires_grad]
    module, replica.module = replica.module, _Delivery(leaves, [gradients.pop(p, None) for p in leaves])
    replica.require_forward_param_sync = False  # the first chunk has broadcast the buffers
    try:
        done = replica.forward(None)
    finally:
        replica.module = module
    done.backward()
    replica._check_reducer_finalized()
    for p, by_any in zip(parameters, trained.tolist(), strict=True):
        if not by_any:
            p.grad = None


class _Deliver(torch.autograd.Function):
    """Return a scalar whose backward gives each parameter its gradient; None leaves ``.grad`` unchanged."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.gradients


class _Delivery(nn.Module):
    """Replaces the wrapped module during the pass that synchronises it."""

    def __init__(self, leaves, gradients):
        super().__init__()
        self.leaves, self.gradients = leaves, gradients

    def forward(self, _):
        return _Deliver.apply(self.gradients, *self.leaves)


class _Hooks:
    """Removes the hooks of parameters while chunks run, so that they run once, with the whole gradient."""

    def __init__(self, streams):
        trained = dict.fromkeys(p for s in streams for p in s.trained)
        hooked = [p for p in trained if p._backward_hooks or p._post_accumulate_grad_hooks]
        self.hooks = {p: (p._backward_hooks, p._post_accumulate_grad_hooks) for p in hooked}
        self.grads = {p: p.grad for p in hooked}

    def __enter__(self):
        for p in self.hooks:
            p._backward_hooks, p._post_accumulate_grad_hooks, p.grad = OrderedDict(), OrderedDict(), None
        return self

    def collect(self) -> dict[Tensor, Tensor]:
        """Return the gradients still to deliver. Hooks of parameters without one stay off: they expect a tensor."""
        gradients = {p: p.grad for p in self.hooks if p.grad is not None}
        for p, grad in self.grads.items():
            p.grad = grad
        self.grads.clear()
        for p in gradients:
            p._backward_hooks, p._post_accumulate_grad_hooks = self.hooks.pop(p)
        return gradients

    def __exit__(self, *_):
        for p, grad in self.grads.items():  # after an error
            p.grad = grad
        for p, (hooks, post_hooks) in self.hooks.items():
            p._backward_hooks, p._post_accumulate_grad_hooks = hooks, post_hooks


class _Buffers:
    """Saves the buffers and restores them before the second encoding."""

    def __init__(self, streams):
        self.saved, self.hooks = {}, []
        for outer in dict.fromkeys(m for s in streams if not s.frozen for m in s.modules):
            self._save(outer)
            for module in outer.modules():
                if isinstance(module, nn.parallel.DistributedDataParallel) and module.broadcast_buffers:
                    # Its first forward broadcasts rank 0's buffers: save them after that.
                    self.hooks.append(module.module.register_forward_pre_hook(self._save_once()))

    def _save(self, module):
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    self.saved[owner, name] = buffer, buffer.clone()

    def _save_once(self):
        seen = []

        def hook(module, args):
            if not seen:
                seen.append(True)
                self._save(module)

        return hook

    @torch.no_grad()
    def rewind(self):
        for hook in self.hooks:
            hook.remove()
        for (owner, name), (buffer, before) in self.saved.items():
            buffer.copy_(before)
            owner._buffers[name] = buffer  # the module may have replaced the tensor


def _accelerators(streams) -> list[torch.device]:
    """Return the devices other than the CPU, whose generators and autocast may be in use."""
    tensors = [t for s in streams for t in _tensors(s.inputs)]
    tensors += [t for s in streams for m in s.modules for t in m.parameters()]
    return list(dict.fromkeys(t.device for t in tensors if t.device.type not in ("cpu", "meta")))


def _random_states(devices) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]


def _set_random_states(states, devices) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def _no_autocast(devices):
    with contextlib.ExitStack() as stack:
        for kind in dict.fromkeys(["cpu", *(d.type for d in devices)]):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _tensors(tree):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, Mapping)):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(item)


def _take(tree, rows: slice):
    """Return ``tree`` with every tensor sliced to these rows."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {key: _take(item, rows) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_take(item, rows) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
