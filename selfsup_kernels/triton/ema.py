"""The moving average of many tensors in one launch: the op ``ema_update_.triton``.

A table on the device says where the tensors lie, and which of them each program works on. It is kept between calls,
since a training loop brings the same tensors at every step.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter

import torch
import triton
import triton.language as tl

from selfsup_kernels import _overlap
from selfsup_kernels.triton import _launch

# Elements of a program, and its warps. The aim is bytes in flight: with 16 elements of either tensor per thread a
# float32 program has 32 KB of reads on their way, and four or five such programs fit an SM at 48 to 50 registers;
# bandwidth times latency is about 25 KB per SM of an H200. Smaller chunks would even out the end of a short list,
# larger ones read the table less often. float64 needs two registers an element, so half the elements per thread.
# Chosen by this arithmetic and by what the compiler makes of it; not tuned on a GPU.
CHUNK = 4096
WARPS = 8
WARPS_WIDE = 16

# What a program does with its tensor: 4 * target + source for two floating dtypes, 16 + log2(bytes) for a copy.
FLOATING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
COPIED = {1: 16, 2: 17, 4: 18, 8: 19}
_FLOATING = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))
_COPIED = tl.constexpr((tl.int8, tl.int16, tl.int32, tl.int64))

# A row of the table: addresses of target and source, elements, the first of the tensor's chunks; 32 bytes, what memory
# is read in. The owner of a chunk is 32 * row + kind: the kind is needed first, to branch while the row is on its way.
ROW = 4
_ROW = tl.constexpr(ROW)

# Philox with 7 rounds passes the statistical batteries (Salmon et al., SC 2011); 10 are Triton's default.
_ROUNDS = tl.constexpr(7)


@triton.jit
def _round_at_random(value, T: tl.constexpr, seed_pointer, counter):
    """float32 to one of its neighbours in ``T``, such that the mean is exact. The last step before infinity, infinity
    and NaN are rounded to nearest.

    Each counter gives four words of 32 bits, one per element.
    """
    a, b, c, d = tl.randint4x(tl.load(seed_pointer), counter + tl.arange(0, value.numel // 4), _ROUNDS)
    word = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), value.shape)
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Sign and magnitude: adding less than one step and cutting goes up with the probability of what was cut.
    if T is tl.bfloat16:
        nearest = 0x7FFF + ((bits >> 16) & 1)
        rounded = bits + tl.where(magnitude < 0x7F7F0000, word & 0xFFFF, nearest)
        rounded = tl.where(magnitude > 0x7F800000, bits | 0x400000, rounded)  # NaN
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        normal = (bits + (word & 0x1FFF)) & 0xFFFFE000
        # Below 2^-14 the steps are all 2^-24. What is left of a step may be far below 2^-32 (a value far below the
        # smallest number), so the draw has a floating scale: the word of another element goes on where this one ends.
        more = tl.reshape(tl.join(tl.join(b, a), tl.join(d, c)), value.shape)
        steps = tl.abs(value) * 16777216.0
        whole = tl.floor(steps)
        draw = word.to(tl.float32) * 2.0**-32 + more.to(tl.float32) * 2.0**-64
        small = tl.where(draw < steps - whole, whole + 1, whole) * 2.0**-24
        small = small.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        rounded = tl.where(magnitude < 0x38800000, small, normal).to(tl.float32, bitcast=True)
        return tl.where(magnitude < 0x477FE000, rounded, value).to(tl.float16)


@triton.jit
def _averaged(t, s, weight, T: tl.constexpr, seed_pointer, counter):
    """What the target becomes. ``t + w (s - t)`` from whichever end is nearer, as torch.lerp does: w = 0 gives ``t``
    and w = 1 gives ``s`` exactly. Where that is not finite it is the sum ``(1 - w) t + w s``, in which an infinity of
    weight 0 does not count."""
    if T.is_int():
        return s
    else:
        if T is tl.float64:
            w = weight
            t, s = t.to(tl.float64), s.to(tl.float64)
        else:
            w = weight.to(tl.float32)
            t, s = t.to(tl.float32), s.to(tl.float32)
        near, far = tl.where(w < 0.5, t, s), tl.where(w < 0.5, s, t)
        part = tl.where(w < 0.5, w, 1 - w)
        step = near + tl.where(w < 0.5, w, w - 1) * (s - t)
        total = tl.where(part == 0, tl.where(far == far, near, far), (1 - part) * near + part * far)
        value = tl.where(tl.abs(step) < float("inf"), step, total)
        if (seed_pointer is not None) and (T.primitive_bitwidth == 16):
            return _round_at_random(value, T, seed_pointer, counter)
        else:
            return value.to(T)


@triton.jit
def _whole_chunk(target, source, weight, seed_pointer, counter, T: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr):
    """A full chunk from addresses that are multiples of 16: the wider dtype moves in 128 bits per thread.

    The second dimension is a thread's vector. As part of the shape it keeps the compiler from choosing one vector
    length for all pairs of dtypes, which it would pay for with exchanges through shared memory. Random bits are made
    for one half after the other, in as many registers as everything else needs.
    """
    V: tl.constexpr = 128 // (T if T.primitive_bitwidth > S.primitive_bitwidth else S).primitive_bitwidth
    SIZE: tl.constexpr = CHUNK // 2 if seed_pointer is not None and T.primitive_bitwidth == 16 else CHUNK
    for start in range(0, CHUNK, SIZE):
        at = start + tl.arange(0, SIZE // V)[:, None] * V + tl.arange(0, V)[None, :]
        to = tl.max_contiguous(tl.multiple_of(target + at, [1, V * T.primitive_bitwidth // 8]), [1, V])
        of = tl.max_contiguous(tl.multiple_of(source + at, [1, V * S.primitive_bitwidth // 8]), [1, V])
        tl.store(to, _averaged(tl.load(to), tl.load(of), weight, T, seed_pointer, counter + start // 4))


@triton.jit
def _part_of_chunk(
    target, source, left, weight, seed_pointer, counter, T: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr
):
    """The last elements of a tensor, or a chunk of one that starts anywhere: element by element, a fourth at a time,
    so that the rare case does not set the number of registers."""
    SIZE: tl.constexpr = CHUNK // 4
    for start in range(0, CHUNK, SIZE):
        at = start + tl.arange(0, SIZE)
        t = tl.load(target + at, mask=at < left, other=0)
        s = tl.load(source + at, mask=at < left, other=0)
        new = _averaged(t, s, weight, T, seed_pointer, counter + start // 4)
        tl.store(target + at, new, mask=at < left)


@triton.jit
def _chunk(
    target, source, first, left, weight, seed_pointer, counter, T: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr
):
    t = target.to(tl.pointer_type(T)) + first
    s = source.to(tl.pointer_type(S)) + first
    if (left < CHUNK) | (((target | source) & 15) != 0):  # chunks themselves are multiples of 16 bytes
        _part_of_chunk(t, s, left, weight, seed_pointer, counter, T, S, CHUNK)
    else:
        _whole_chunk(t, s, weight, seed_pointer, counter, T, S, CHUNK)


# A momentum may be an element of a schedule: no variant of the kernel for where it starts. Nor is there one for each
# number: float64 is passed as it is, where Triton would make float32 of it.
@triton.jit(do_not_specialize_on_alignment=["rows", "owners", "momentum_pointer", "seed_pointer"])
def _ema_kernel(
    rows,
    owners,
    momentum: tl.float64,
    momentum_pointer,
    seed_pointer,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per chunk. The branches are uniform: every program takes one of them.

    ``WIDE``: the table has float64 tensors. Without them the other branches get by with fewer registers.
    """
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    kind = owner & 31
    row = rows + (owner >> 5).to(tl.int64) * _ROW
    target = tl.load(row)
    source = tl.load(row + 1)
    first = (chunk - tl.load(row + 3)) * CHUNK
    left = tl.minimum(tl.load(row + 2) - first, CHUNK).to(tl.int32)
    if momentum_pointer is None:
        weight = 1.0 - tl.full((), momentum, tl.float64)
    else:
        weight = 1.0 - tl.load(momentum_pointer).to(tl.float64)
    counter = chunk.to(tl.int64) * (CHUNK // 4)  # one per four elements, over all tensors
    for t in tl.static_range(4 if WIDE else 3):
        for s in tl.static_range(4 if WIDE else 3):
            if kind == 4 * t + s:
                _chunk(target, source, first, left, weight, seed_pointer, counter, _FLOATING[t], _FLOATING[s], CHUNK)
    for c in tl.static_range(4):
        if kind == 16 + c:
            _chunk(target, source, first, left, weight, seed_pointer, counter, _COPIED[c], _COPIED[c], CHUNK)


def update_(targets, sources, momentum_tensor, momentum, seed):
    """As ``reference.ema.update_``. The host waits for nothing, and allocates nothing but a new list's table and what
    pairs of different layouts need.

    Raises:
        ValueError, TypeError: a list that the public function refuses, where its table is made.
    """
    if len(targets) != len(sources):
        raise ValueError(f"sources: expected {len(targets)} tensors, as many as targets, got {len(sources)}")
    if not targets:
        return
    if momentum_tensor is not None and momentum_tensor.device != targets[0].device:
        momentum, momentum_tensor = momentum_tensor.item(), None  # on the host, where reading it waits for nothing
    with _launch.on_device_of(targets[0]):
        table, write_back = _table_of(targets, sources), []
        if table.loose:
            targets, sources, write_back = _pack(targets, sources, table.loose)
            table = _table_of(targets, sources) if targets else table
        if table.chunks:
            seed = seed if table.low else None
            _launch.launch(
                _ema_kernel,
                (table.chunks,),
                table.rows,
                table.owners,
                float(momentum),
                momentum_tensor,
                seed,
                WIDE=table.wide,
                CHUNK=CHUNK,
                num_warps=WARPS_WIDE if table.wide else WARPS,
                enable_fp_fusion=True,
            )
        for target, packed in write_back:
            target.copy_(packed)


# Memory layouts


def _one_run(target, source) -> bool:
    """Whether both lie in memory in the same order without gaps, so that the strides do not matter."""
    if target.is_contiguous() and source.is_contiguous():
        return True
    return _strides(target) == _strides(source) and _dense(target)


def _strides(tensor):
    return [(stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def _dense(tensor) -> bool:
    expected = 1
    for stride, n in sorted(_strides(tensor)):
        if stride != expected:
            return False
        expected *= n
    return True


def _pack(targets, sources, loose):
    """The lists with ``loose`` pairs made alike in memory, and the targets to write back: ``[(target, packed)]``.

    Such a pair costs more launches and temporaries: one copy of the source; for a target with gaps also one there and
    one back. Integers are copied right here, which is one launch.
    """
    pairs, write_back = [], []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if i in loose:
            if not target.is_floating_point():
                target.copy_(source)
                continue
            if not _dense(target):
                write_back.append((target, target.contiguous()))
                target = write_back[-1][1]
            if not _one_run(target, source):
                source = torch.empty_like(target, dtype=source.dtype).copy_(source)  # in the order of the target
        pairs.append((target, source))
    return [t for t, _ in pairs], [s for _, s in pairs], write_back


# The table and its cache

MOST_TABLES = 16
"""Of each device. A table takes 32 bytes per tensor and 4 bytes per chunk, and so does its key on the host."""

_tables: dict[torch.device, dict[tuple, "_Table"]] = {}
"""By device and key, the least recently used first."""

_captured: dict[int, object] = {}
"""What captured graphs may still read, by identity. Nothing tells when a graph is gone, so it stays for good."""

_lock = threading.RLock()


class _Table:
    """Where the tensors of a list lie; no reference to them is held.

    ``chunks`` is the number of programs. ``loose`` are the positions of pairs that are not alike in memory; if there
    are any, the table itself is left out. ``wide`` and ``low`` say that there are float64 tensors, 16-bit targets.
    """

    def __init__(self, targets, sources):
        rows, kinds, counts, loose, first = [], [], [], set(), 0
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if target.shape != source.shape:
                raise ValueError(f"sources[{i}]: expected shape {tuple(target.shape)}, got {tuple(source.shape)}")
            if target.device != targets[0].device or source.device != targets[0].device:
                raise ValueError(f"targets[{i}], sources[{i}]: expected tensors on {targets[0].device}")
            kind = _kind(i, target, source)
            if target.numel() == 0 or _overlap.identical(target, source):
                continue
            if not _one_run(target, source):
                loose.add(i)
                continue
            rows += [target.data_ptr(), source.data_ptr(), target.numel(), first]
            kinds.append(kind)
            counts.append(_launch.cdiv(target.numel(), CHUNK))
            first += counts[-1]
        self.loose = loose
        self.wide = any(kind < 16 and 3 in (kind // 4, kind % 4) for kind in kinds)
        self.low = any(4 <= kind < 12 for kind in kinds)
        self.chunks = 0 if loose else first
        self.staging = self.uploaded = None
        self.streams: set[int] = set()
        if self.chunks:
            # The default device is the user's business.
            owners = [32 * row + kind for row, kind in enumerate(kinds)]
            owners, counts = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in (owners, counts))
            words = torch.zeros(len(rows) + _launch.cdiv(first, 2), dtype=torch.int64, device="cpu")
            words[: len(rows)] = torch.tensor(rows, dtype=torch.int64, device="cpu")
            words[len(rows) :].view(torch.int32)[:first] = torch.repeat_interleave(owners, counts)
            _upload(self, words, targets[0].device)
            self.rows, self.owners = self.words[: len(rows)], self.words[len(rows) :].view(torch.int32)


def _kind(i, target, source) -> int:
    t, s = target.dtype, source.dtype
    if t in FLOATING and s in FLOATING:
        return 4 * FLOATING[t] + FLOATING[s]
    if t != s or t.is_floating_point or t.is_complex or t.itemsize not in COPIED:
        raise TypeError(f"targets[{i}], sources[{i}]: expected floating dtypes or one of integers, got {t} and {s}")
    return COPIED[t.itemsize]


_dtype = attrgetter("dtype")


def _key(targets, sources):
    """All that a table depends on, by calls into C alone: it is made at every step, for hundreds of tensors."""
    both = [*targets, *sources]
    Tensor = torch.Tensor
    layout = None
    if not all(map(Tensor.is_contiguous, both)):
        layout = (tuple(map(Tensor.size, both)), tuple(map(Tensor.stride, both)))
    return tuple(map(Tensor.data_ptr, both)), tuple(map(Tensor.numel, both)), tuple(map(_dtype, both)), layout


def _table_of(targets, sources) -> _Table:
    device = targets[0].device
    key = _key(targets, sources)
    capturing = _capturing(device)
    with _lock:
        tables = _tables.setdefault(device, {})
        table = tables.pop(key, None)
        if table is None:
            table = _Table(targets, sources)
            if capturing and table.chunks:
                # Its copy is a node of the graph and runs when that is replayed: of no use to anything else. The
                # table is a temporary of the graph, as others are; what is copied from must outlive the graph.
                _captured[id(table.staging)] = table.staging
                return table
        elif capturing:
            # The graph will read it at every replay. It is there by then: whoever updates the same targets has to
            # order the replay after the call that made the table, and an event from outside cannot be waited for.
            _captured[id(table)] = table
        elif table.chunks and device.type == "cuda":
            _order(table)
        tables[key] = table
        while len(tables) > MOST_TABLES:
            del tables[next(iter(tables))]
    return table


def _capturing(device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _order(table) -> None:
    """The first use on another stream waits for the upload, and keeps the memory from being taken before it is read.

    On the stream of the upload both follow from the order of the stream: the upload came before, and memory that is
    freed there is only given to what comes after.
    """
    stream = torch.cuda.current_stream()
    if stream.cuda_stream not in table.streams:
        stream.wait_event(table.uploaded)
        table.words.record_stream(stream)
        table.streams.add(stream.cuda_stream)


def _upload(table, words, device) -> None:
    """Start to copy ``words`` to the device; the host does not wait. Called on that device."""
    if device.type != "cuda":
        table.words = _launch.empty(words.shape, words.dtype, "cpu").copy_(words)
        return
    stream = torch.cuda.current_stream()

    def copy():
        with torch.cuda.stream(stream):
            # Pinned memory is not handed out again before the copies from it have run: PyTorch sees to that.
            table.staging = words.pin_memory()
            table.words = _launch.empty(words.shape, words.dtype, device)
            table.words.copy_(table.staging, non_blocking=True)

    if _capturing(device):
        copy()
        return
    # In a thread of its own, because a memory pool may be in use in this one (that of a CUDA graph while its warm-up
    # runs, or the user's), from which nothing may be kept. Allocations of other threads do not come from such pools.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(copy).result()
    table.staging = None
    table.uploaded = torch.cuda.Event()
    table.uploaded.record(stream)
    table.streams.add(stream.cuda_stream)
