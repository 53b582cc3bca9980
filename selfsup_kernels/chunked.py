"""A loss over a batch whose activations do not fit: gradient caching (arXiv:2101.06983)."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Tensor = torch.Tensor


def chunked_backward(encoder, views, loss, chunk_size, *, scaler=None, backward=None, modules=()):
    r"""The loss of a whole batch and its gradients, with the activations of one chunk in memory.

    The gradient caching of arXiv:2101.06983: every chunk is encoded without a graph, the loss of all embeddings is
    computed and run backward as far as the embeddings, then every chunk is encoded again, with a graph, and run
    backward with its part of their gradient. The price is a second forward of the encoder. In place of
    ``criterion([encoder(x) for x in views]).backward()``::

        criterion = sk.InfoNCELoss(0.07)
        value = sk.chunked_backward(encoder, views, criterion, chunk_size=64)
        optimizer.step()
        optimizer.zero_grad()

    Gradients are added to ``.grad`` as ``backward()`` does it, those of the loss' own parameters too (a learnable
    temperature). They are exact where the encoder treats each sample by itself, up to the order of summation.

    What makes the second forward equal to the first:

    - Random numbers: each chunk starts from the states of the CPU's and the accelerators' generators that it had the
      first time, so that dropout masks are the same. Afterwards the generators stand where the loss left them.
      Generators of Python, NumPy or your own are not replayed.
    - Buffers (BatchNorm's running statistics) go back to where they were and are updated again in the same order, so
      that in the end each chunk has updated them once. In training mode BatchNorm takes mean and variance over a
      *chunk*: the loss is then not the one of the whole batch, but its gradient is still exact.
    - Autocast: call this function inside it. Both encodings and the loss run under it, the backward passes do not.

    Under DistributedDataParallel give the wrapped module as ``encoder``: all chunks but its last run in ``no_sync()``,
    so that gradients are reduced once. The loss then wants a ``group=``, which makes it the loss of the global batch.
    Processes may have different numbers of samples and of chunks (not with ``nn.SyncBatchNorm``, which communicates in
    every chunk). Parameters of the loss are outside the wrapped module: averaging their gradients is up to you.

    Args:
        encoder: a module or a function, from a chunk of one view to a tensor with a row per sample; or a sequence of
            one per view.
        views: a sequence of the views' inputs. All tensors in one but 0-dim ones have the samples as their first
            dimension and are cut into chunks. A tensor is passed as ``encoder(x)``, a tuple or list as
            ``encoder(*x)``, a mapping as ``encoder(**x)``; what is nested in these is cut, too.
        loss: a function from the list of embeddings, one ``(B, D)`` tensor per view, to a 0-dim tensor: a module such
            as :class:`selfsup_kernels.InfoNCELoss`, or a lambda.
        chunk_size: samples per chunk, or a sequence of one number per view.
        scaler: a ``torch.amp.GradScaler``: the gradients are those of the scaled loss.
        backward: what runs the loss backward in place of ``loss.backward()``: Lightning's ``self.manual_backward``,
            ``fabric.backward``, ``accelerator.backward``, ``lambda loss: (loss / 4).backward()``.
        modules: the modules behind an ``encoder`` that is a plain function: whose buffers go back and whose
            ``no_sync()`` is used. Modules, their methods, and partials of both are found.

    Returns:
        The loss, detached and unscaled.

    Raises:
        ValueError, TypeError: an argument does not fit, or what the encoder or the loss returned; the message says why.
        RuntimeError: gradients are switched off (``torch.no_grad()``).
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("chunked_backward: expected gradients to be on, got a call under torch.no_grad()")
    if scaler is not None and backward is not None:
        raise ValueError("backward: expected None together with scaler")
    streams = _streams(encoder, views, chunk_size, modules)
    chunks = [chunk for stream in streams for chunk in stream.chunks()]
    devices = _accelerators(streams)
    buffers = _Buffers(streams)
    try:
        with torch.no_grad():
            embeddings = _embed(streams, chunks, devices)
    finally:
        buffers.rewind()

    value = loss(embeddings)
    if not isinstance(value, Tensor) or value.dim():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a function that returns a 0-dim tensor, got {got}")
    with _no_autocast(devices):
        if backward is not None:
            backward(value)
        else:
            (value if scaler is None else scaler.scale(value)).backward()
    _encode_again([c for c in chunks if not c.stream.frozen], embeddings, devices)
    return value.detach()


@dataclass
class _Stream:
    """One view: its encoder, its inputs, and what is known of the modules that encode it."""

    view: int
    encoder: object
    inputs: object
    size: int  # of a chunk
    modules: list[nn.Module]
    samples: int = field(init=False)
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
        trained = [p for m in self.modules for p in m.parameters()] + tensors
        self.frozen = bool(self.modules) and not any(t.requires_grad for t in trained)

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
    if isinstance(views, (Tensor, Mapping, str)) or not isinstance(views, Sequence):
        raise TypeError(f"views: expected a sequence of one input per view, got {type(views).__name__}")
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
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"chunk_size: expected an integer >= 1, got {size!r}")
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


def _embed(streams, chunks, devices) -> list[Tensor]:
    """All rows of each view, leaves of the graph of the loss; every chunk has noted its random states."""
    parts: dict[int, list[Tensor]] = {}
    for chunk in chunks:
        chunk.random_states = _random_states(devices)
        rows = chunk.encode()
        if not rows.is_floating_point():
            raise TypeError(f"encoder: expected one that returns floating rows, got {rows.dtype}")
        parts.setdefault(chunk.stream.view, []).append(rows)
    return [torch.cat(parts[s.view]).requires_grad_(not s.frozen) for s in streams]


def _encode_again(chunks, embeddings, devices) -> None:
    """Each chunk's forward with a graph, and its backward."""
    syncing = [_syncing(chunk.stream.modules) for chunk in chunks]
    after = _random_states(devices)
    try:
        for i, chunk in enumerate(chunks):
            _set_random_states(chunk.random_states, devices)
            grad = embeddings[chunk.stream.view].grad
            with contextlib.ExitStack() as stack:
                for module in syncing[i]:
                    if any(module in later for later in syncing[i + 1 :]):
                        stack.enter_context(module.no_sync())
                rows = chunk.encode()
                if not rows.requires_grad:
                    continue
                with _no_autocast(devices):
                    rows.backward(torch.zeros_like(rows) if grad is None else grad[chunk.rows])
    finally:
        _set_random_states(after, devices)


def _syncing(modules) -> list[nn.Module]:
    """The outermost of the modules that communicate in backward, and can be told not to."""
    found = []
    for module in modules:
        found += [module] if callable(getattr(module, "no_sync", None)) else _syncing(module.children())
    return found


class _Buffers:
    """The buffers that the second encoding changes again."""

    def __init__(self, streams):
        self.saved, self.hooks = {}, []
        for outer in dict.fromkeys(m for s in streams if not s.frozen for m in s.modules):
            self._save(outer)
            for module in outer.modules():
                if isinstance(module, nn.parallel.DistributedDataParallel) and module.broadcast_buffers:
                    # Its first forward takes the buffers of rank 0: those are what the first encoding starts from.
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
            owner._buffers[name] = buffer  # where the module has put another tensor in its place


def _accelerators(streams) -> list[torch.device]:
    """Devices other than the CPU, whose generators and autocast may take part."""
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
    """``tree`` with every tensor cut to these rows."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {key: _take(item, rows) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_take(item, rows) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
