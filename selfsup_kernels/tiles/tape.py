"""Tapes: the launches of one call, recorded once for each signature, then replayed by ``csrc/launch``.

The host takes far longer to launch a kernel from Python than the GPU takes for a small batch. So the first call with a
signature (shapes, strides, dtypes, device, settings; ``csrc/launch/ops.cpp`` has all of it) goes through the launchers
of this package while a :class:`Recorder` watches, and later ones repeat its launches in C++. Addresses and the
temperature are inputs of a replay. A call that does anything but allocate and launch is not recorded, and always goes
through Python.
"""

import os
import struct
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
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

OFF = launcher.INTERPRETED or os.environ.get("SELFSUP_KERNELS_TAPE") == "0"
"""Every call goes through Python."""

_launch, _empty, _hooks = launcher.launch, launcher.empty, triton.knobs.runtime


def settings() -> int:
    """Return PyTorch's settings that launches depend on, as bits; negative where no tape may be used: where kernels are
    interpreted, configurations are overridden, or a tool watches the launches."""
    watched = launcher.launch is not _launch or launcher.empty is not _empty
    watched = watched or _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls
    if OFF or watched or configs.overridden():
        return -1
    return launcher.deterministic() + 2 * takes_tf32(torch.float32)


class Recorder(TorchDispatchMode):
    """Watch the launches and allocations of a call. As a dispatch mode it sees PyTorch's own operators as well, which a
    tape cannot repeat: it refuses those that write, or that give the host a value. The results of others are tensors
    without a place in the call's memory, which a launch cannot take."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs
        self.made: list[torch.Tensor] = []  # kept, so that no address is used twice
        self.launches: list[tuple] = []
        self.refusal: str | None = None

    def __enter__(self):
        launcher.recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error):
        launcher.recording.recorder = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not isinstance(result, (torch.Tensor, list, tuple)):
            self.refusal = str(func)
        return result

    def launched(self, kernel, grid, arguments, options, compiled):
        if self.refusal is None:
            try:
                self.launches.append(self._launch(kernel, grid, arguments, options, compiled))
            except _NotReplayable as reason:
                self.refusal = str(reason)

    def tape(self, returned) -> Tape | None:
        """Return the tape of a call that returned these tensors, or None if it cannot be replayed."""
        places = [self._place(result) for result in returned]
        if self.refusal is not None or None in places:
            return None
        slots, offsets, end = {}, {}, 0
        for place, tensor in enumerate(self.made):
            if place in places:
                slots[place], offsets[place] = len(self.inputs) + places.index(place), 0
            else:
                slots[place], offsets[place] = len(self.inputs) + len(places), end
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

        def resolved(address):
            """Turn a place among the tensors that the call made into one in its memory."""
            slot, offset = address
            made = slot - len(self.inputs)
            return address if made < 0 else Address(slots[made], offsets[made] + offset)

        def parameter(p):
            if p.kind == "pointer":
                return p._replace(value=resolved(p.value))
            if p.kind == "map":
                return p._replace(value=p.value._replace(address=resolved(p.value.address)))
            return p

        launches = [item._replace(parameters=[*map(parameter, item.parameters)]) for item in self.launches]
        made = [self.made[place] for place in places]
        outputs = [(tuple(t.shape), t.stride(), str(t.dtype).removeprefix("torch.")) for t in made]
        return Tape(outputs, end, launches)

    def _place(self, result):
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
        given = [(i, t.data_ptr(), t.nbytes) for i, t in enumerate(self.inputs) if t is not None]
        same = [Address(i, 0) for i, start, _ in given if start == at]
        within = [Address(i, at - start) for i, start, size in given if start < at < start + size]
        if same:  # the first of several: which inputs have one address is part of the signature
            return same[0]
        if len(within) == 1:
            return within[0]
        raise _NotReplayable("a tensor that the call neither got nor allocated")


def _constant(kind, value):
    if kind not in FORMATS:
        raise _NotReplayable(f"a number of type {kind}")
    return Parameter("constant", struct.pack(FORMATS[kind], value))


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
