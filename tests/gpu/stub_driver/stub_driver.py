"""Run Triton's own launch path without a GPU: its launchers are compiled and run on a stub driver.

`driver.c` replaces the CUDA driver and launches nothing. This module checks each request against the driver's rules,
and reads the arguments of a kernel back from its raw parameters, whose sizes are in the machine code. Use it in a
separate process, before anything else loads libcuda.so.1.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as runtime

from selfsup_kernels.core import backends
from selfsup_kernels.lab import machine_code
from selfsup_kernels.tiles import launcher

SOURCE = Path(__file__).with_name("driver.c")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
MAP_BYTES = 128
INVALID = 1  # CUDA_ERROR_INVALID_VALUE
SHARED_WITHOUT_ASKING = 48 << 10
DYNAMIC_SHARED, STATIC_SHARED, REGISTERS, MAX_THREADS, LOCAL = 8, 1, 4, 0, 3  # CUfunction_attribute
TYPES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}  # bytes; CUtensorMapDataType
SWIZZLES = {0: None, 1: 32, 2: 64, 3: 128}
FORMATS = {"i1": "b", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}


class TensorMap(NamedTuple):
    address: int
    type: int
    dims: tuple
    strides: tuple
    box: tuple
    swizzle: int


class Launched(NamedTuple):
    kernel: str
    variant: str
    """A digest of its instructions."""
    grid: tuple
    threads: int
    shared: int
    values: dict
    """By name, as the parameters hold them; tuples have names like p.0, a tensor map is one. Empty for a launch from a
    tape, whose arguments have no names."""
    raw: list
    """The parameters: bytes, or a TensorMap."""
    pointers: list
    """The numbers of the parameters that are addresses."""
    replayed: bool


class Cubin:
    """The properties that the driver reads from machine code: parameters, registers, shared memory, threads."""

    def __init__(self, image: int):
        header = ctypes.string_at(image, 64)
        at, (size, count, names) = struct.unpack_from("<Q", header, 40)[0], struct.unpack_from("<3H", header, 58)
        sections = [struct.unpack("<IIQQQQIIQQ", ctypes.string_at(image + at + i * size, 64)) for i in range(count)]
        text = lambda offset: ctypes.string_at(image + sections[names][4] + offset).decode()  # noqa: E731
        sections = {text(s[0]): s for s in sections}
        (self.name,) = (name.removeprefix(".text.") for name in sections if name.startswith(".text."))
        self.parameters, self.threads, self.opted = {}, None, 0
        for attribute, value in self._attributes(image, sections[f".nv.info.{self.name}"]):
            if attribute in (0x17, 0x45):  # EIATTR_KPARAM_INFO
                ordinal, offset, packed = struct.unpack_from("<HHI", value, 4)
                self.parameters[ordinal] = (offset, packed >> 18 if attribute == 0x17 else packed & 0xFFFF)
            elif attribute == 0x10:  # EIATTR_REQNTID
                self.threads = math.prod(struct.unpack("<3I", value))
        counts = [v for a, v in self._attributes(image, sections[".nv.info"]) if a == 0x2F]  # EIATTR_REGCOUNT
        self.registers = max(struct.unpack("<2I", value)[1] for value in counts)
        self.static = sections.get(f".nv.shared.{self.name}", [0] * 6)[5]
        _, _, _, _, at, size, *_ = sections[f".text.{self.name}"]
        self.digest = hashlib.sha256(ctypes.string_at(image + at, size)).hexdigest()

    @staticmethod
    def _attributes(image, section):
        data, at = ctypes.string_at(image + section[4], section[5]), 0
        while at < len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:  # EIFMT_SVAL: followed by as many bytes as stated; other forms have none
                yield attribute, data[at : at + size]
                at += size

    def attribute(self, number):
        return {STATIC_SHARED: self.static, REGISTERS: self.registers, MAX_THREADS: self.threads, LOCAL: 0}[number]


class Stub:
    """The stub library and a record of its calls. ``refused`` lists the reasons of all refusals."""

    def __init__(self, folder: Path):
        path = folder / "libcuda.so.1"
        flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}"]
        subprocess.run([os.environ.get("CC", "gcc"), *flags, SOURCE, "-o", path], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # "libcuda.so.1" is the stub from here on
        self.cubins, self.maps, self.launches, self.refused, self.expected = [], [], [], [], None
        i, p = ctypes.c_int, ctypes.c_void_p
        self._functions = {
            "stub_load": ctypes.CFUNCTYPE(i, p)(self._load),
            "stub_attribute": ctypes.CFUNCTYPE(i, i, i)(lambda kernel, number: self.cubins[kernel].attribute(number)),
            "stub_set_attribute": ctypes.CFUNCTYPE(i, i, i, i)(self._set_attribute),
            "stub_encode": ctypes.CFUNCTYPE(i, p, i, i, ctypes.c_uint64, p, p, p, p, i, i, i)(self._encode),
            "stub_launch": ctypes.CFUNCTYPE(i, p, i, p)(self._launch),
        }
        self.watch(True)

    def in_place(self) -> bool:
        """Return whether libcuda.so.1 is the stub; it is not if another one was loaded before."""
        address = lambda library: ctypes.cast(library.cuLaunchKernelEx, ctypes.c_void_p).value  # noqa: E731
        return address(ctypes.CDLL("libcuda.so.1")) == address(self.library)

    def watch(self, on: bool):
        """Turn recording and checking on or off."""
        for name, function in self._functions.items():
            pointer = ctypes.cast(function, ctypes.c_void_p).value if on else None
            ctypes.c_void_p.in_dll(self.library, name).value = pointer

    def _refuse(self, *reasons):
        self.refused += reasons
        return INVALID if reasons else 0

    def _load(self, image):
        self.cubins.append(Cubin(image))
        return len(self.cubins) - 1

    def _set_attribute(self, kernel, attribute, value):
        cubin = self.cubins[kernel]
        if attribute != DYNAMIC_SHARED:
            return INVALID  # of later GPUs: Triton tries it
        if value + cubin.static > machine_code.RESOURCES[90].block_shared:
            return self._refuse(f"{cubin.name}: {value} bytes of dynamic shared memory")
        cubin.opted = value
        return 0

    def _encode(self, to, kind, rank, address, dims, strides, box, steps, interleave, swizzle, fill):
        """Check a tensor map by the rules of cuTensorMapEncodeTiled in the driver API's documentation."""
        dims = struct.unpack(f"{rank}Q", ctypes.string_at(dims, 8 * rank))
        strides = struct.unpack(f"{rank - 1}Q", ctypes.string_at(strides, 8 * (rank - 1)))
        box, steps = (struct.unpack(f"{rank}I", ctypes.string_at(x, 4 * rank)) for x in (box, steps))
        row = box[0] * TYPES[kind]
        wrong = {
            "the map is not aligned": to % 64,
            "address": address % 16,
            "dims": not all(0 < d <= 2**32 for d in dims),
            "strides": any(s % 16 or s >= 2**40 for s in strides) or strides[0] < dims[0] * TYPES[kind],
            "box": not all(0 < b <= 256 for b in box),
            "the row of the box is not of 16 bytes": row % 16,
            "the row of the box exceeds the swizzle": SWIZZLES[swizzle] is not None and row > SWIZZLES[swizzle],
            "steps, interleave": set(steps) != {1} or interleave,
            "NaN for a type that has none": fill and not 6 <= kind <= 12,
        }
        self.maps.append(TensorMap(address, kind, dims[::-1], strides, box[::-1], swizzle))
        ctypes.c_uint64.from_address(to).value = len(self.maps)  # its number, which kernel parameters then contain
        return self._refuse(*(f"tensor map, {reason}: {self.maps[-1]}" for reason, is_so in wrong.items() if is_so))

    def _launch(self, config, kernel, parameters):
        x, y, z, threads, *sides, shared = struct.unpack("7I", ctypes.string_at(config, 28))
        attributes = struct.unpack("I", ctypes.string_at(config + 48, 4))[0]
        cubin = self.cubins[kernel]
        warps = math.ceil(threads / 32)
        wrong = {
            f"grid {x, y, z}": not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16),
            f"{threads} threads of {cubin.threads}": threads != cubin.threads or sides != [1, 1],
            f"{cubin.registers} registers of {threads} threads": warps * -(-cubin.registers // 8) * 256 > 65536,
            f"{shared} bytes of shared memory": shared > max(cubin.opted, SHARED_WITHOUT_ASKING - cubin.static),
            "parameters": sum(size for _, size in cubin.parameters.values()) > 4096,
            f"{attributes} attributes": attributes,
        }
        pointers = struct.unpack(f"{len(cubin.parameters)}Q", ctypes.string_at(parameters, 8 * len(cubin.parameters)))
        raw = [ctypes.string_at(p, cubin.parameters[i][1]) for i, p in enumerate(pointers)]
        values, replayed = self._values(cubin, raw), self.expected is None
        raw = [self.maps[struct.unpack_from("Q", data)[0] - 1] if len(data) == MAP_BYTES else data for data in raw]
        pointers = [i for i, (_, kind, *_) in enumerate(self.expected or ()) if kind[0] == "*"]
        self.expected = None
        self.launches.append(
            Launched(cubin.name, cubin.digest, (x, y, z), threads, shared, values, raw, pointers, replayed)
        )
        return self._refuse(*(f"{cubin.name}: {reason}" for reason, is_so in wrong.items() if is_so))

    def _values(self, cubin, raw):
        """Return the parameters by name; check that each has the machine code's size and the expected value."""
        if self.expected is None:
            return {}
        expected = [*self.expected, ("global scratch", "*", None, False), ("profile scratch", "*", None, False)]
        if len(expected) != len(raw):
            self.refused.append(f"{cubin.name}: {len(expected)} parameters, the machine code has {len(raw)}")
            return {}
        values = {}
        for (name, kind, meant, divisible), data in zip(expected, raw, strict=True):
            if kind == "nvTmaDesc":
                value = self.maps[struct.unpack_from("Q", data)[0] - 1] if any(data) else None
                meant, right = None, len(data) == MAP_BYTES and value is not None and value.address == meant
            else:
                form = "Q" if kind[0] == "*" else FORMATS[kind]
                right = struct.calcsize(form) == len(data)
                value = struct.unpack(form, data)[0] if right else data
                if kind[0] == "*":
                    meant = 0 if meant is None else meant
                right &= value == (struct.unpack(form, struct.pack(form, meant))[0])
                right &= not (divisible and value % 16)
            if not right:
                self.refused.append(f"{cubin.name}: {name} ({kind}) is {value}, meant was {meant}")
            values[name] = value
        return values


def _flat(name, kind, value, attributes, path):
    """Yield (name, type, value, divisible by 16) of every kernel parameter that an argument becomes."""
    if kind == "constexpr":
        return
    if isinstance(kind, tuple):
        for i, (k, v) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{name}.{i}", k, v, attributes, (*path, i))
    elif kind.startswith("tensordesc"):
        yield name, "nvTmaDesc", value.base.data_ptr(), False
        yield from ((f"{name}.shape.{i}", "i32", n, False) for i, n in enumerate(value.shape))
        yield from ((f"{name}.stride.{i}", "i64", n, False) for i, n in enumerate(value.strides))
    else:
        divisible = any(a[0] == "tt.divisibility" for a in attributes.get(path, ()))
        yield name, kind, value.data_ptr() if kind[0] == "*" else value, divisible


stub: Stub | None = None
"""The one of this process."""


def install(folder: Path) -> Stub:
    """Make the stub Triton's driver; CPU tensors take the place of tensors on device 0, an H100."""
    global stub
    stub = Stub(folder)
    from triton.backends.nvidia import driver as nvidia

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            self.source = src

        def __call__(self, grid_x, grid_y, grid_z, stream, function, *others):
            signature = self.source.signature
            arguments = zip(signature.items(), others[-len(signature) :], strict=True)
            stub.expected = [
                parameter
                for i, ((name, kind), value) in enumerate(arguments)
                for parameter in _flat(name, kind, value, self.source.attrs, (i,))
            ]
            super().__call__(grid_x, grid_y, grid_z, stream, function, *others)

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    runtime.set_active(Driver())
    launcher.arch_of = lambda tensor: 90
    launcher.sms_of = lambda tensor: machine_code.RESOURCES[90].sms
    backends.select = lambda impl, *_, **__: "triton"
    return stub


def variants(kernel) -> int:
    """Return how many compiled variants of a kernel this process holds."""
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
