"""Compile the Triton kernels for an architecture that need not be there, and say what is wrong with the machine code.

The public functions are called with CPU tensors while ``launcher.launch`` records instead of launching: what is
compiled is what a user's call launches. Triton compiles for any architecture; only its driver looks for a device, and
is replaced meanwhile. The numbers of the results mean nothing.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from selfsup_kernels.core import backends
from selfsup_kernels.lab import sass
from selfsup_kernels.tiles import launcher


class Resources(NamedTuple):
    """The resources of an SM (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    block_shared: int
    """Bytes of shared memory that one program may have."""
    shared: int
    threads: int
    programs: int
    sms: int
    """SMs of the most common data-centre part, by which launchers size their grids."""


KB = 1024
RESOURCES = {
    80: Resources(163 * KB, 164 * KB, 2048, 32, 108),
    86: Resources(99 * KB, 100 * KB, 1536, 16, 84),
    90: Resources(227 * KB, 228 * KB, 2048, 32, 132),
    100: Resources(227 * KB, 228 * KB, 2048, 32, 148),
    120: Resources(99 * KB, 100 * KB, 1536, 24, 188),
}
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512

MATRIX_KERNELS = ("sums_kernel", "gradient_kernel", "wave_kernel", "product_kernel", "siglip_wave_kernel")
"""Kernels that are wrong without the architecture's matrix instruction."""


class Code(NamedTuple):
    """The machine code of one kernel, in numbers."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    """Columns of Blackwell's tensor memory."""
    counts: dict[str, int]

    def count(self, pattern: str) -> int:
        """Count the instructions whose name begins with ``pattern``."""
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))


class Launch(NamedTuple):
    """One kernel as a launcher asked for it."""

    kernel: str
    constants: dict
    options: dict
    key: str
    """Names the compiled kernel."""
    code: Code | None
    error: str | None
    """Why there is no code."""

    @property
    def warps(self):
        return self.options.get("num_warps", 4)


def available() -> str | None:
    """Return None where kernels can be compiled and read, else the reason."""
    if launcher.INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled"
    found = sass.tool() and sass.tool().with_name("nvdisasm").exists()
    return None if found else f"this Triton ({triton.__version__}) comes without cuobjdump or nvdisasm"


def _driver(architecture):
    """Return as much of a driver as compiling asks for."""
    target = GPUTarget("cuda", architecture, 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"sm_{architecture}",  # the key of each kernel's own cache
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


@contextlib.contextmanager
def compiling(architecture: int, record: Callable):
    """Let launchers call ``record(kernel, grid, *args, **options)`` instead of launching, and Triton compile for
    ``architecture``. Public functions then take CPU tensors, and return memory that nothing has written."""
    launchers = {
        "launch": lambda kernel, *args, **options: record(launcher.kernel_of(kernel), *args, **options),
        "arch_of": lambda tensor: architecture,
        "sms_of": lambda tensor: RESOURCES[architecture].sms,
    }
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # The workspaces of a large call are never written to: filling them would be all the time this takes.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with (
            mock.patch.multiple(launcher, **launchers),
            mock.patch.multiple(backends, select=lambda *_, **__: "triton"),
            mock.patch.object(driver, "_active", _driver(architecture)),
        ):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def recording(architecture: int, wanted: Callable[[str], bool] = lambda kernel: True):
    """Let launchers compile for ``architecture`` and launch nothing. Yields a list that fills with one
    :class:`Launch` for every kernel that is ``wanted`` and that differs from those before it. Their machine code is
    read at the end, together."""
    launches, compiled = [], {}

    def record(kernel, grid, *args, **options):
        if wanted(kernel.__name__):
            launch, result = compile_kernel(kernel, grid, *args, **options)
            if launch.key not in compiled:
                compiled[launch.key] = result
                launches.append(launch)

    with compiling(architecture, record):
        yield launches
    codes = read([result for result in compiled.values() if result is not None], architecture)
    launches[:] = [launch._replace(code=codes.get(launch.key)) for launch in launches]


def compile_kernel(kernel, grid, *args, **options):
    """Compile for the active driver's architecture. Return the launch, without its code, and what Triton returns. A
    kernel that does not compile is a result, not an exception: a launch with an error, and None."""
    own = {name: value for name, value in options.items() if name in kernel.arg_names}
    others = {name: value for name, value in options.items() if name not in own}
    constants = {}
    for name, value in own.items():
        constants |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where ptxas refuses, Triton prints the whole listing
            compiled = kernel.warmup(*map(launcher.for_triton, args), grid=grid, **options, **launcher.ALWAYS)
        return Launch(kernel.__name__, constants, others, compiled.hash, None, None), compiled
    except Exception as error:  # a compiler fails in many ways
        refused = re.search(r"ptxas\S* (?:fatal|error)\s*: .*", str(error))
        text = refused[0] if refused else " ".join(str(error).split())[-200:]  # the reason comes last, after the place
        text = f"{type(error).__name__}: {text}"
        return Launch(kernel.__name__, constants, others, f"{kernel.__name__} {options} {text}", None, text), None


def read(compiled, architecture: int) -> dict[str, Code]:
    """Read the machine code of compiled kernels, by hash. What was read is kept in Triton's cache: even together, they
    take longer to disassemble than to find there."""
    codes, unread = {}, []
    for kernel in compiled:
        manager = get_cache_manager(hashlib.sha256(f"{kernel.hash} machine code 4".encode()).hexdigest())
        if kept := manager.get_file("code.json"):
            codes[kernel.hash] = Code(**json.loads(Path(kept).read_text()))
        else:
            unread.append((kernel, manager))
    counted = sass.counts_of_cubins([kernel.asm["cubin"] for kernel, _ in unread], architecture)
    for (kernel, manager), counts in zip(unread, counted, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            (usage,) = sass.usage_of(sass.dump("-res-usage", file.name)).values()
        shared, columns = kernel.metadata.shared + usage.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
        code = codes[kernel.hash] = Code(usage.registers, usage.stack, shared, columns, dict(counts))
        manager.put(json.dumps(code._asdict()), "code.json", binary=False)
    return codes


def occupancy(code: Code, warps: int, architecture: int) -> int:
    """Return how many programs fit one multiprocessor at a time."""
    r = RESOURCES[architecture]
    per_warp = 256 * math.ceil(32 * code.registers / 256)  # handed out in these units
    limits = [r.programs, r.threads // (32 * warps), REGISTERS // (per_warp * warps)]
    limits.append(r.shared // (code.shared + KB))  # the system takes one KB of each program
    if code.tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // code.tensor_memory)
    return min(limits)


MATRIX_INSTRUCTION = {90: ("HGMMA", "HGMMA"), 100: ("tcgen05", r"UTC\w*MMA")}
"""Architecture -> (name, pattern) of its matrix instruction, where that is not HMMA."""


def matrix_count(code: Code, architecture: int) -> int:
    """Count the architecture's own matrix instructions in the code."""
    return code.count(MATRIX_INSTRUCTION.get(architecture, ("HMMA", "HMMA"))[1])


def problems(launch: Launch, architecture: int) -> list[str]:
    """Return why a kernel must not be shipped with this configuration; empty where nothing is wrong."""
    if launch.code is None:
        return [launch.error]
    code, found = launch.code, []
    if code.stack:
        found.append(f"stack frame of {code.stack} bytes")
    if spills := code.count("LDL|STL"):
        found.append(f"{spills} local loads and stores")
    limit = RESOURCES[architecture].block_shared
    if code.shared > limit:
        found.append(f"shared memory {code.shared / KB:.0f} KB of {limit // KB}")
    if launch.kernel in MATRIX_KERNELS:
        # Hopper's and Blackwell's own instructions take float32 operands in one order only; HMMA takes both.
        older = code.count("HMMA")
        fits = older and launch.constants.get("PRECISION", "ieee") != "ieee"
        if not matrix_count(code, architecture) and not fits:
            name = MATRIX_INSTRUCTION.get(architecture, ("HMMA",))[0]
            found.append(f"no {name}" + (" (HMMA instead)" if older else ""))
        if fences := code.count(r"MEMBAR\.(ALL|SC)\.GPU"):
            found.append(f"{fences} fences of the whole device")  # the default order of an atomic; none here needs it
    if launch.constants.get("DESCRIPTOR") and not code.count("UTMALDG"):
        found.append("no UTMALDG, though its tiles come by descriptor")
    return found
