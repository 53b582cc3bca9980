"""Tapes: the launches of one call, recorded once for each signature, then replayed by ``csrc/launch``.

The host takes far longer to launch a kernel from Python than the GPU takes for a small batch. So the first call with a
signature (shapes, strides, dtypes, device, settings; ``csrc/launch/ops.cpp`` has all of it) goes through the launchers
of this package while a :class:`Recorder` watches, and later ones repeat its launches in C++. Addresses and the
temperature are inputs of a replay. A call that does anything but allocate, launch and take views of its tensors has no
tape, and always goes through Python.
"""

import os
import struct
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from selfsup_kernels.core import backends
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.layout import takes_tf32


class Address(NamedTuple):
    """A place in the memory of a call."""

    slot: int
    """An input of the call, then its outputs, then the workspace, which holds all other tensors."""
    offset: int
    """In bytes."""


class Map(NamedTuple):
    """The arguments of cuTensorMapEncodeTiled; the innermost dimension comes first."""

    address: Address
    type: int
    swizzle: int
    fill: int
    sizes: list[int]
    strides: list[int]
    """In bytes, without that of the innermost dimension."""
    box: list[int]


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    kind: str
    """"constant", "pointer", "map", or the type of a number that is an input: "float32", "float64"."""
    value: bytes | Address | Map | None


class Launch(NamedTuple):
    name: str
    function: int
    """The CUfunction."""
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: list[Parameter]


class Tape(NamedTuple):
    outputs: list[tuple]
    """(sizes, strides, dtype) of the tensors that a call returns."""
    workspace_bytes: int
    launches: list[Launch]


class _NotReplayable(Exception):
    """A call did something that a tape cannot repeat."""


FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
"""The types of Triton's signatures as ``struct`` names them."""

ALIGNMENT = 512
"""Of each tensor in the workspace: that of PyTorch's allocator, so that a kernel's assumptions hold."""

WARP = 32

_loaded: dict[int, object] = {}
"""Triton's kernels by CUfunction: kept, so that none is unloaded while a tape launches it."""

OFF = launcher.INTERPRETED or os.environ.get("SELFSUP_KERNELS_TAPE") == "0"
"""Every call goes through Python."""

MOST_LAUNCHES = 256
"""Of a tape. A call with more keeps the GPU so busy that the host does not matter."""

_hooks = triton.knobs.runtime


def settings() -> int:
    """Return PyTorch's settings that launches depend on, as bits; negative where no tape may be used: where kernels are
    interpreted, configurations are overridden, or a tool or a hook of Triton watches the launches."""
    if OFF or launcher.watched() or configs.overridden():
        return -1
    for hook in (_hooks.launch_enter_hook, _hooks.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks, or as in older versions one, or None
            return -1
    return launcher.deterministic() + 2 * takes_tf32(torch.float32)


class Recorder(TorchDispatchMode):
    """Watch the launches and allocations of a call. As a dispatch mode it sees PyTorch's own operators as well, which a
    tape cannot repeat: it refuses all but views and the allocations of :func:`selfsup_kernels.tiles.launcher.empty`."""

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

    def launched(self, kernel, grid, arguments, options, compiled):
        """Note a launch. Triton leaves out those with an empty grid."""
        if self.refusal is None and 0 not in grid:
            try:
                self.launches.append(self._launch(kernel, grid, arguments, options, compiled))
            except _NotReplayable as reason:
                self.refusal = str(reason)

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

    def _launch(self, kernel, grid, arguments, options, compiled):
        facts = compiled.metadata
        scratch = facts.global_scratch_size or facts.profile_scratch_size
        if scratch or facts.num_ctas != 1 or facts.launch_cooperative_grid or facts.launch_pdl:
            raise _NotReplayable(f"{kernel.__name__}: a launch with attributes or scratch memory")
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        descriptors = iter(facts.tensordesc_meta or ())
        parameters = [
            parameter
            for name, kind in compiled.src.signature.items()
            for parameter in self._parameters(kind, values.get(name), descriptors)
        ]
        null = Parameter("constant", bytes(8))
        parameters += [null, null]  # the two kinds of scratch memory
        _loaded[compiled.function] = compiled
        grid = (*grid, 1, 1)[:3]
        return Launch(facts.name, compiled.function, grid, WARP * facts.num_warps, facts.shared, parameters)

    def _parameters(self, kind, value, descriptors):
        """Yield the parameters that one argument of Triton's signature becomes."""
        if kind == "constexpr":
            return
        if isinstance(kind, tuple):
            for k, v in zip(kind, value, strict=True):
                yield from self._parameters(k, v, descriptors)
        elif isinstance(value, TensorDescriptor):
            yield Parameter("map", self._map(value, next(descriptors, None)))
            yield from (_constant("i32", n) for n in value.shape)
            yield from (_constant("i64", n) for n in value.strides)
        elif isinstance(value, torch.Tensor):
            yield Parameter("pointer", self._address(value)) if value.numel() else Parameter("constant", bytes(8))
        elif isinstance(value, launcher.Input):
            if kind not in ("fp32", "fp64"):
                raise _NotReplayable(f"an input of type {kind}")
            yield Parameter("float32" if kind == "fp32" else "float64", None)
        else:
            yield _constant(kind, value)

    def _map(self, descriptor, facts):
        try:
            from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
        except ImportError:
            raise _NotReplayable("a version of Triton that numbers types in another way") from None
        if facts is None or facts["fp4_padded"]:
            raise _NotReplayable("a tensor descriptor without a tensor map")
        if getattr(descriptor, "round_f32_to_tf32", False):
            raise _NotReplayable("a tensor map that rounds")
        return Map(
            address=self._address(descriptor.base),
            type=TMA_DTYPE_DEVICE_TO_HOST[facts["elem_type"]],
            swizzle=facts["swizzle"],
            fill=int(descriptor.padding == "nan"),
            sizes=list(descriptor.shape[::-1]),
            strides=[facts["elem_size"] * n for n in descriptor.strides[-2::-1]],
            box=list(facts["block_size"][::-1]),
        )

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
            raise _NotReplayable("a tensor that the call neither got nor allocated")
        return views[0]


def _constant(kind, value):
    if kind not in FORMATS:
        raise _NotReplayable(f"a number of type {kind}")
    try:
        return Parameter("constant", struct.pack(FORMATS[kind], value))
    except (struct.error, OverflowError) as error:
        raise _NotReplayable(str(error)) from None


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
