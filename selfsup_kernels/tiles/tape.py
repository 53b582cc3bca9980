"""Tapes: the launches of one call, recorded once for each signature, then replayed by ``csrc/launch``.

The host takes far longer to launch a kernel from Python than the GPU takes for a small batch. So the first call with a
signature (shapes, strides, dtypes, device, settings; ``csrc/launch/ops.cpp`` has all of it) goes through the launchers
of this package while a :class:`Recorder` watches, and later ones repeat its launches in C++. Addresses and the
temperature are inputs of a replay. A call that does anything but allocate, launch and take views of its tensors has no
tape, and always goes through Python.
"""

import os
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_kernels.core import backends
from selfsup_kernels.tiles import code, configs, launcher
from selfsup_kernels.tiles.code import Address, Launch, Unsupported
from selfsup_kernels.tiles.layout import takes_tf32


class Tape(NamedTuple):
    outputs: list[tuple]
    """(sizes, strides, dtype) of the tensors that a call returns."""
    workspace_bytes: int
    launches: list[Launch]


ALIGNMENT = 512
"""Of each tensor in the workspace: that of PyTorch's allocator, so that a kernel's assumptions hold."""

_loaded: dict[int, object] = {}
"""Triton's kernels by CUfunction: kept, so that none is unloaded while a tape launches it."""

OFF = launcher.INTERPRETED or os.environ.get("SELFSUP_KERNELS_TAPE") == "0"
"""Every call goes through Python."""

MOST_LAUNCHES = 256
"""Of a tape. A call with more keeps the GPU so busy that the host does not matter."""


def settings() -> int:
    """Return PyTorch's settings that launches depend on, as bits; negative where no tape may be used: where kernels are
    interpreted, configurations are overridden, or a tool or a hook of Triton watches the launches."""
    if OFF or launcher.watched() or configs.overridden() or launcher.hooked():
        return -1
    return launcher.deterministic() + 2 * takes_tf32(torch.float32)


class Recorder(TorchDispatchMode):
    """Watch the launches and allocations of a call. As a dispatch mode it sees PyTorch's own operators as well, which a
    tape cannot repeat: it refuses all but views and the allocations of :func:`selfsup_kernels.tiles.launcher.empty`."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # PyTorch's way to skip would import torch._dynamo, for seconds; no op is traced as it runs

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs
        self.made: list[torch.Tensor] = []  # kept, so that no address is used twice
        self.launches: list[Launch] = []
        self.refusal: str | None = None
        """The reason why the call has no tape."""

    def __enter__(self):
        self._outer, launcher.recording.recorder = launcher.recording.recorder, self
        return super().__enter__()

    def __exit__(self, *error):
        launcher.recording.recorder = self._outer
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format and not _is_view(func, args, result):
            self.refusal = str(func)
        return result

    def launched(self, found: code.Code, grid, arguments):
        """Note a launch."""
        if self.refusal is None:
            try:
                self.launches.append(code.launch_of(found, grid, arguments, self._address))
            except Unsupported as reason:
                self.refusal = str(reason)

    def launched_by_triton(self, compiled, grid, arguments):
        """Note a launch of a kernel that Triton has compiled. Triton leaves out those with an empty grid."""
        if self.refusal is not None or 0 in grid:
            return
        try:
            found = code.of_compiled(compiled)._replace(function=compiled.function)
        except Unsupported as reason:
            self.refusal = str(reason)
            return
        _loaded[compiled.function] = compiled
        self.launched(found, grid, arguments)

    def tape(self, returned) -> Tape | None:
        """Return the tape of a call that returned these tensors, or None if it cannot be replayed."""
        outputs = [self._number(result) for result in returned]
        if self.refusal is not None or None in outputs or len(self.launches) > MOST_LAUNCHES:
            return None
        start, workspace, end = len(self.inputs), len(self.inputs) + len(outputs), 0
        memory = []  # of each tensor that the call made
        for number, tensor in enumerate(self.made):
            if number in outputs:
                memory.append(Address(start + outputs.index(number), 0))
            else:
                memory.append(Address(workspace, end))
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

        def resolved(address):
            """Turn the number of a tensor that the call made into its memory."""
            slot, offset = address
            if slot < start:
                return address
            return Address(memory[slot - start].slot, memory[slot - start].offset + offset)

        def parameter(p):
            if p.kind == "pointer":
                return p._replace(value=resolved(p.value))
            if p.kind == "map":
                return p._replace(value=p.value._replace(address=resolved(p.value.address)))
            return p

        launches = [item._replace(parameters=[*map(parameter, item.parameters)]) for item in self.launches]
        shapes = [(tuple(t.shape), t.stride(), str(t.dtype).removeprefix("torch.")) for t in returned]
        return Tape(shapes, end, launches)

    def _number(self, result):
        return next((i for i, tensor in enumerate(self.made) if tensor is result), None)

    def _address(self, tensor):
        """Return the slot and the offset of a tensor. Until the call has returned, and shown which tensors are its
        outputs, each tensor that it made is a slot."""
        at = tensor.data_ptr()
        for i, made in enumerate(self.made):
            offset = at - made.data_ptr()
            if made.numel() and 0 <= offset < made.nbytes:
                return Address(len(self.inputs) + i, offset)
        given = [(i, at - t.data_ptr(), t) for i, t in enumerate(self.inputs) if t is not None]
        for i, offset, _ in given:
            if offset == 0:  # the first of several: which inputs have one address is part of the signature
                return Address(i, 0)
        memory = tensor.untyped_storage()._cdata
        views = [Address(i, offset) for i, offset, t in given if t.untyped_storage()._cdata == memory]
        if len(views) != 1 or views[0].offset < 0:
            raise Unsupported("a tensor that the call neither got nor allocated")
        return views[0]


def _is_view(func, arguments, result):
    """Return True if an operator only returned other views of its arguments' memory."""
    results = result if isinstance(result, (list, tuple)) else [result]
    if func._schema.is_mutable or not all(isinstance(r, torch.Tensor) for r in results):
        return False
    given = {a.untyped_storage()._cdata for a in arguments if isinstance(a, torch.Tensor)}
    return all(r.untyped_storage()._cdata in given for r in results)


def _inputs(arguments):
    """Return the tensors among the arguments of an op in order, None where an optional one is missing."""
    found = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found += argument
        elif argument is None or isinstance(argument, torch.Tensor):
            found.append(argument)
    return found


def run(launch, arguments):
    """Return ``launch(*arguments)``; if the op that called this waits for a tape, record one."""
    tapes = _tapes()
    if tapes is None or not tapes.awaited():
        return launch(*arguments)
    recorder = Recorder(_inputs(arguments))
    with recorder:
        returned = launch(*arguments)
    tapes.store(recorder.tape(returned))
    return returned


def _tapes():
    """Return the part of the C++ extension that keeps tapes, or None without the extension."""
    extension, _ = backends.load_extension()
    return None if extension is None else extension.tape
