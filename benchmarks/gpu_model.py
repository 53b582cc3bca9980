"""What fraction of the matrix units' rate a compiled kernel can reach, from its instructions: a prediction to measure.

Clocks of one multiprocessor for one tile of one program:

    matrix        operations of the tile / operations a clock. TF32 has half of bfloat16's rate, and float32 of full
                  precision takes three such products (tf32x3). ``mma.sync`` (HMMA) where the architecture has an
                  instruction of its own for the matrix units runs at LEGACY of the rate.
    exponential   MUFU instructions of the main loop x warps x 32 / 16 a clock
    vector        the slowest of the other parts: issue (four warps a clock), float32 (FADD, FMUL, FFMA: 64 or 128 lanes
                  a clock), integers, conversions and comparisons (64 lanes), SHFL (32), shared memory (128 bytes)
    memory        bytes that the tile loads or stores / bytes a clock from the L2 cache

The other parts of a program hide each other (``max(exponential, vector)``), since they go through different units and
several warps take turns. Loads run ahead where there is more than one stage, else they add up. A program's own matrix
products and the rest do not hide each other: a warp waits for its products before it uses them. So with one program on
a multiprocessor these add up, with two or more programs the longest part is what takes the time:

    one program     max(memory, matrix + max(exponential, vector))
    several         max(memory, matrix, max(exponential, vector))

``fraction`` is the time that the matrix units need for the products themselves (no padding of the rows) over that. What
the model leaves out: waits of a few instructions for each other, barriers, the first and last tiles of a program,
clock rates under load, and that a matrix product alone reaches about 0.8 of the nominal rate. So a fraction is a bound
to compare a measurement with, and only its order between configurations is meant to be believed.
"""

import re
from typing import NamedTuple

from selfsup_kernels.lab import machine_code, sass


class Rates(NamedTuple):
    """Of one multiprocessor, each clock. From NVIDIA's papers on the architectures, dense, float32 accumulation."""

    bfloat16: int
    """Floating-point operations."""
    float_lanes: int
    integer_lanes: int
    l2_bytes: int
    """Assumed: three quarters of the 64 of a multiprocessor's port on data-centre parts, half on the others."""


RATES = {
    80: Rates(2048, 64, 64, 48),
    89: Rates(1024, 128, 64, 32),
    90: Rates(4096, 128, 64, 48),
    100: Rates(8192, 128, 64, 48),
    120: Rates(1024, 128, 128, 32),
}
LEGACY = {90: 0.62, 100: 0.25}
"""HMMA on Hopper: published microbenchmarks. On Blackwell: a guess."""

FLOAT = re.compile(r"F(ADD|MUL|FMA)")
SHARED = re.compile(r"(LDS|STS|LDSM|STSM)\b")


class Prediction(NamedTuple):
    """Clocks per tile, programs on a multiprocessor, and ``fraction``."""

    matrix: float
    exponential: float
    vector: float
    memory: float
    programs: int
    exponentials: float
    """MUFU.EX2 that a thread issues per tile."""
    shuffles: float
    fraction: float
    bound: str
    """The part that takes the most time."""


class Tile(NamedTuple):
    operations: float
    """Of the matrix units, rows padded as the tile is; of one of the products that make one of full float32."""
    useful: float
    bytes: float
    pieces: int
    """Passes of the loop over pieces of the rows, where there is one."""


def tile(launch: machine_code.Launch, dim: int, item_size: int) -> Tile:
    """The work of one pass of the main loop."""
    c = launch.constants
    m, n, k = c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]
    padded = -(-c["STRIDE"] // k) * k
    if launch.kernel == "product_kernel":
        operations = 2 * m * n * c["WIDTH"]
        accumulators = 4 * m * n * (1 if c["FIRST"] else 2)
        return Tile(operations, operations, (m + n) * c["WIDTH"] * item_size + accumulators, c["WIDTH"] // k)
    products = 2 if launch.kernel == "gradient_kernel" else 1
    if launch.kernel == "wave_kernel":
        moved = (m + n) * padded + m * n
    elif launch.kernel == "gradient_kernel":
        moved = n * padded
    else:
        moved = m * padded if c.get("RESIDENT") else (m + n) * padded
    return Tile(2 * products * m * n * padded, 2 * products * m * n * dim, moved * item_size, padded // k)


def predict(
    launch: machine_code.Launch, architecture: int, dim: int, item_size: int, programs: int
) -> Prediction | None:
    """None for kernels without matrix products. ``programs``: those that the launcher puts on a multiprocessor."""
    if launch.code is None or launch.code.loop is None or launch.kernel not in machine_code.MATRIX_KERNELS:
        return None
    rates, work = RATES[architecture], tile(launch, dim, item_size)
    products = 3 if launch.constants["PRECISION"] == "tf32x3" else 1
    counts, operations = _per_tile(launch, work, products)
    rate = rates.bfloat16 if item_size == 2 else rates.bfloat16 / 2
    own = machine_code.matrix_count(launch.code, architecture)
    matrix = operations / (rate if own else rate * LEGACY.get(architecture, 1.0))

    def issued(test):
        return launch.warps * sum(n for name, n in counts.items() if test(name))

    exponential = issued(lambda name: name.startswith("MUFU")) * 32 / 16
    floats = issued(FLOAT.match) * 32 / rates.float_lanes
    others = issued(lambda name: not (FLOAT.match(name) or SHARED.match(name) or sass.is_matrix(name)))
    # Of what is left, about half goes to the integer lanes: the rest are branches, barriers and uniform instructions.
    integers = 0.5 * others * 32 / rates.integer_lanes
    shared = launch.warps * sum(n * _shared_clocks(name) for name, n in counts.items() if SHARED.match(name))
    shuffles = issued(lambda name: name.startswith("SHFL"))
    vector = max(issued(lambda name: True) / 4, floats, integers, shuffles, shared)
    memory = work.bytes / rates.l2_bytes
    fit = max(1, machine_code.occupancy(launch.code, launch.warps, architecture))
    resident = min(fit, programs) if launch.kernel == "sums_kernel" else fit
    rest = max(exponential, vector)
    busy = matrix + rest if resident == 1 else max(matrix, rest)
    hidden = launch.options.get("num_stages", 3) > 1
    total = max(memory, busy) if hidden else memory + busy
    parts = {"matrix": matrix, "exponential": exponential, "vector": vector, "memory": memory}
    return Prediction(
        matrix=matrix,
        exponential=exponential,
        vector=vector,
        memory=memory,
        programs=resident,
        exponentials=sum(n for name, n in counts.items() if name.startswith(sass.EXPONENTIAL)),
        shuffles=sum(n for name, n in counts.items() if name.startswith("SHFL")),
        fraction=work.useful * products / rate / total,
        bound=max(parts, key=parts.get),
    )


def _per_tile(launch, work, products):
    """Instructions that a warp issues for a tile, and operations of the matrix units: more than the tile needs where
    warps make the same products twice. A loop that the compiler unrolled makes several tiles, or pieces, in a pass."""
    once, inner = launch.code.loop

    def done(counts):
        each = [(sass.matrix_operations(name, launch.warps), n) for name, n in counts.items() if sass.is_matrix(name)]
        # The size of a tcgen05 product is not in its name.
        return None if any(o is None for o, _ in each) else sum(o * n for o, n in each)

    needed = work.operations * products
    at_once, again = done(once), done(inner)
    if any(sass.is_matrix(name) for name in inner):
        pieces = work.pieces
        unrolled = max(1, int(again / (needed / pieces) + 0.01)) if again else 1
        passes = pieces / unrolled
        counts = {name: once.get(name, 0) + passes * inner.get(name, 0) for name in {*once, *inner}}
        return counts, max(needed, passes * again) if again else needed
    tiles = max(1, int(at_once / needed + 0.01)) if at_once else 1
    return {name: n / tiles for name, n in once.items()}, max(needed, at_once / tiles) if at_once else needed


def _shared_clocks(name):
    if "M88.4" in name or ".128" in name:
        return 4
    return 2 if "M88.2" in name or ".64" in name else 1
