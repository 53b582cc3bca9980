"""Compiles the kernels for an architecture that need not be there, and tells what is wrong with the machine code.

The public functions are called with CPU tensors while ``_launch.launch`` records instead of launching: what is compiled
is what a user's call launches. Triton compiles for any architecture; only its driver looks for a device, and is
replaced meanwhile. No number of the results means anything.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from selfsup_kernels.core import backends
from selfsup_kernels.lab import sass
from selfsup_kernels.tiles import launcher

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
READER = 3
"""Part of the key under which what was read from a kernel is kept, in Triton's own cache."""


class Resources(NamedTuple):
    """What a multiprocessor has (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    block_shared: int
    """Bytes of shared memory that one program may have."""
    shared: int
    threads: int
    programs: int
    processors: int
    """Of the data-centre part that most people have; launchers size their grids by it."""


KB = 1024
RESOURCES = {
    80: Resources(163 * KB, 164 * KB, 2048, 32, 108),
    89: Resources(99 * KB, 100 * KB, 1536, 24, 142),
    90: Resources(227 * KB, 228 * KB, 2048, 32, 132),
    100: Resources(227 * KB, 228 * KB, 2048, 32, 148),
    120: Resources(99 * KB, 100 * KB, 1536, 24, 188),
}
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512

MATRIX_KERNELS = ("sums_kernel", "gradient_kernel", "wave_kernel", "product_kernel")
"""Kernels whose work is matrix products: they are wrong without the architecture's instruction for them."""


class Code(NamedTuple):
    """What the machine code of one kernel says about it."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    """Columns of Blackwell's tensor memory."""
    counts: dict[str, int]
    loop: tuple[dict[str, int], dict[str, int]] | None
    """:class:`selfsup_kernels.lab.sass.MainLoop`."""

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(prefixes))

    @property
    def tensor_core_fifth(self) -> int:
        """tcgen05 products."""
        return sum(n for name, n in self.counts.items() if re.match(r"UTC\w*MMA", name))


class Launch(NamedTuple):
    """One kernel as one launcher asked for it."""

    module: str
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
    """None where kernels can be compiled and read, else the reason."""
    if launcher.INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled"
    if not (TOOLS / "cuobjdump").exists():
        return f"this Triton ({triton.__version__}) comes without cuobjdump"
    return None


class _NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"sm_{self.target.arch}"  # the key of each kernel's own cache

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def recording(architecture: int, wanted: Callable[[str], bool] = lambda kernel: True):
    """Within it launchers compile for ``architecture`` and launch nothing. Gives a list that fills with one
    :class:`Launch` for every kernel that is ``wanted`` and that differs from those before it."""
    launches, seen = [], set()

    def record(kernel, grid, *args, **options):
        if not wanted(kernel.__name__):
            return
        launch = compile_kernel(kernel, grid, *args, **options)
        if launch.key not in seen:
            seen.add(launch.key)
            launches.append(launch)

    replaced = {
        (launcher, "launch"): record,
        (launcher, "arch_of"): lambda tensor: architecture,
        (launcher, "processors_of"): lambda tensor: RESOURCES[architecture].processors,
        (backends, "select"): lambda impl, *_, **__: "triton",
    }
    before = {(owner, name): getattr(owner, name) for owner, name in replaced}
    active = driver._active
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # The workspaces of a large call are never written to: filling them would be all the time this takes.
    torch.utils.deterministic.fill_uninitialized_memory = False
    driver.set_active(_NoDevice(architecture))
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield launches
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)
        driver._active = active
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)


def compile_kernel(kernel, grid, *args, **options) -> Launch:
    """Compile for the active driver's architecture, and read. Never raises on account of the kernel."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    others = {name: value for name, value in options.items() if not name.isupper()}
    module = kernel.fn.__module__.rsplit(".", 1)[-1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where ptxas refuses, Triton prints the whole listing
            compiled = kernel.warmup(*args, grid=grid, **options)
        return Launch(module, kernel.__name__, constants, others, compiled.hash, read(compiled), None)
    except Exception as error:  # a compiler fails in many ways, and each is a finding
        refused = re.search(r"ptxas (?:fatal|error)\s*: .*", str(error))
        text = refused[0] if refused else " ".join(str(error).split())[-200:]  # the reason comes last, after the place
        text = f"{type(error).__name__}: {text}"
        key = f"{kernel.__name__} {options} {text}"
        return Launch(module, kernel.__name__, constants, others, key, None, text)


def read(compiled) -> Code:
    """What the machine code says; kept beside the kernel in Triton's cache, since disassembling costs as long as
    finding a compiled kernel there."""
    manager = get_cache_manager(hashlib.sha256(f"{compiled.hash} {READER}".encode()).hexdigest())
    kept = manager.get_file("code.json")
    if kept:
        return Code(**json.loads(Path(kept).read_text()))
    code = _read(compiled)
    manager.put(json.dumps(code._asdict()), "code.json", binary=False)
    return code


def _read(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, usage = (_cuobjdump(option, file.name) for option in ("-sass", "-res-usage"))
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    code = sass.instructions(listing)
    counts: dict[str, int] = {}
    for instruction in code:
        counts[instruction.name] = counts.get(instruction.name, 0) + 1
    loop = sass.main_loop(code)
    return Code(
        registers=int(used[1]),
        stack=int(used[2]),
        shared=compiled.metadata.shared + int(used[3]),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        counts=counts,
        loop=loop and tuple(loop),
    )


def _cuobjdump(option, path):
    done = subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout


def occupancy(code: Code, warps: int, architecture: int) -> int:
    """Programs that fit one multiprocessor at a time."""
    r = RESOURCES[architecture]
    per_warp = 256 * math.ceil(32 * code.registers / 256)  # handed out in these units
    limits = [r.programs, r.threads // (32 * warps), REGISTERS // (per_warp * warps)]
    limits.append(r.shared // (code.shared + KB))  # each program has one KB of the system's
    if code.tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // code.tensor_memory)
    return min(limits)


def matrix_instruction(architecture: int) -> str:
    return {90: "HGMMA", 100: "tcgen05"}.get(architecture, "HMMA")


def matrix_count(code: Code, architecture: int) -> int:
    """The architecture's own matrix instructions in the code."""
    name = matrix_instruction(architecture)
    return code.tensor_core_fifth if name == "tcgen05" else code.count(name)


def problems(launch: Launch, architecture: int) -> list[str]:
    """Why a kernel must not be shipped with this configuration; none: no objection."""
    if launch.code is None:
        return [launch.error]
    code, found = launch.code, []
    if code.stack:
        found.append(f"stack frame of {code.stack} bytes")
    if spills := code.count("LDL", "STL"):
        found.append(f"{spills} local loads and stores")
    limit = RESOURCES[architecture].block_shared
    if code.shared > limit:
        found.append(f"shared memory {code.shared / KB:.0f} KB of {limit // KB}")
    if launch.kernel in MATRIX_KERNELS and not matrix_count(code, architecture):
        # Hopper's and Blackwell's own instructions take float32 operands in one order only; the older one takes both.
        older = code.count("HMMA")
        if not (older and launch.constants.get("PRECISION", "ieee") != "ieee"):
            found.append(f"no {matrix_instruction(architecture)}" + (" (HMMA instead)" if older else ""))
    if launch.kernel in MATRIX_KERNELS and (fences := code.count("MEMBAR.ALL.GPU", "MEMBAR.SC.GPU")):
        found.append(f"{fences} fences of the whole device")  # an atomic's default order; nothing here needs one
    if launch.constants.get("DESCRIPTOR") and not code.count("UTMALDG"):
        found.append("no UTMALDG, though its tiles come by descriptor")
    return found


def remarks(launch: Launch, architecture: int, programs: int = 1) -> list[str]:
    """What costs time, but is not wrong."""
    found = []
    if launch.code is None:
        return found
    if launch.kernel in MATRIX_KERNELS and not matrix_count(launch.code, architecture):
        found.append(f"HMMA in place of {matrix_instruction(architecture)}")
    fit = occupancy(launch.code, launch.warps, architecture)
    if fit < programs:
        found.append(f"{programs} programs asked for, {fit} fit")
    return found
