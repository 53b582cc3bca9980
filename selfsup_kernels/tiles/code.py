"""One launch as the CUDA driver takes it: a kernel's machine code, and the bytes of its parameters.

Triton's own launcher does this for the kernels that Triton compiles in this process; here it is done for tapes, and for
machine code that was compiled ahead of time.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


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


class Input(float):
    """A number that may differ in each replay of a tape; any other is the same for all calls with one signature."""


@dataclass(frozen=True)
class Descriptor:
    """Rows that a kernel loads in blocks through a tensor map (TMA)."""

    base: torch.Tensor
    block: tuple[int, int]
    """Rows, and numbers of a row."""


class MapFacts(NamedTuple):
    """What the machine code of a kernel expects of a tensor map."""

    type: int
    """CUtensorMapDataType."""
    swizzle: int
    element_bytes: int
    box: tuple[int, ...]
    """The innermost dimension comes last."""


class Code(NamedTuple):
    """The machine code of a kernel."""

    name: str
    signature: list
    """The type of each argument as in Triton's signatures: "constexpr", "*bf16", "i32"; a list for a tuple."""
    threads: int
    shared_bytes: int
    maps: list[MapFacts]
    """Of the tensor descriptors among the arguments, in order."""
    function: int = 0
    """The CUfunction; 0: not loaded."""


class Unsupported(Exception):
    """Only Triton can launch this."""


FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
"""The types of Triton's signatures as ``struct`` names them."""

WARP = 32


def of_compiled(compiled) -> Code:
    """Return the code of a kernel that Triton has compiled; raises :class:`Unsupported`."""
    facts = compiled.metadata
    scratch = facts.global_scratch_size or facts.profile_scratch_size
    if scratch or facts.num_ctas != 1 or facts.launch_cooperative_grid or facts.launch_pdl:
        raise Unsupported(f"{facts.name}: a launch with attributes or scratch memory")
    signature = list(compiled.src.signature.values())
    maps = [_map_facts(m) for m in facts.tensordesc_meta or ()]
    return Code(facts.name, signature, WARP * facts.num_warps, facts.shared, maps)


def _map_facts(facts):
    try:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    except ImportError:
        raise Unsupported("a version of Triton that numbers types in another way") from None
    if facts is None or facts["fp4_padded"]:
        raise Unsupported("a tensor descriptor without a tensor map")
    kind = TMA_DTYPE_DEVICE_TO_HOST[facts["elem_type"]]
    return MapFacts(kind, facts["swizzle"], facts["elem_size"], tuple(facts["block_size"]))


def launch_of(code: Code, grid, arguments, address: Callable[[torch.Tensor], Address]) -> Launch:
    """Return the launch of a kernel with these arguments. ``address`` says where a tensor lies."""
    maps = iter(code.maps)
    parameters = [
        parameter
        for kind, value in zip(code.signature, arguments, strict=False)  # constants come last, by name
        for parameter in _parameters(kind, value, maps, address)
    ]
    null = Parameter("constant", bytes(8))
    parameters += [null, null]  # the two kinds of scratch memory
    return Launch(code.name, code.function, (*grid, 1, 1)[:3], code.threads, code.shared_bytes, parameters)


def _parameters(kind, value, maps, address):
    """Yield the parameters that one argument of Triton's signature becomes."""
    if kind == "constexpr":
        return
    if isinstance(kind, (tuple, list)):
        for k, v in zip(kind, value, strict=True):
            yield from _parameters(k, v, maps, address)
    elif isinstance(value, Descriptor):
        base, facts = value.base, next(maps, None)
        if facts is None:
            raise Unsupported("a tensor descriptor without a tensor map")
        strides = [facts.element_bytes * n for n in base.stride()[-2::-1]]
        box = list(facts.box[::-1])
        yield Parameter("map", Map(address(base), facts.type, facts.swizzle, 0, [*base.shape[::-1]], strides, box))
        yield from (_constant("i32", n) for n in base.shape)
        yield from (_constant("i64", n) for n in base.stride())
    elif isinstance(value, torch.Tensor):
        yield Parameter("pointer", address(value)) if value.numel() else Parameter("constant", bytes(8))
    elif isinstance(value, Input):
        if kind not in ("fp32", "fp64"):
            raise Unsupported(f"an input of type {kind}")
        yield Parameter("float32" if kind == "fp32" else "float64", None)
    else:
        yield _constant(kind, value)


def _constant(kind, value):
    if kind not in FORMATS:
        raise Unsupported(f"a number of type {kind}")
    try:
        return Parameter("constant", struct.pack(FORMATS[kind], value))
    except (struct.error, OverflowError) as error:
        raise Unsupported(str(error)) from None
