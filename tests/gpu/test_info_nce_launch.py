"""Test which kernels the InfoNCE launchers launch, over which grid and with which work. Only the last test runs
kernels."""

import inspect
import math
from collections import Counter

import pytest
import torch
from helpers import info_nce_call, random_labels

from selfsup_kernels.core import backends, ops
from selfsup_kernels.info_nce.objectives import Columns
from selfsup_kernels.info_nce.ops import forward_fake_triton
from selfsup_kernels.lab import tune
from selfsup_kernels.tiles import configs, kernels, launcher, waves
from selfsup_kernels.tiles.arguments import Finish, GradientWork, PairedRows, SiglipWave, Sizes, Source, SumsWork
from selfsup_kernels.tiles.gradient import MOST_COLUMNS
from selfsup_kernels.tiles.layout import PADDING, Layout

H200 = 132
IMPL = "triton"


class Launch:
    """A recorded launch, with its arguments by name."""

    def __init__(self, kernel, grid, args, options):
        function = getattr(kernels, kernel)
        names = [p.name for p in function.params] if hasattr(function, "params") else function.arg_names
        self.name = kernel.removesuffix("_kernel")
        self.grid, self.options = grid, options
        self.given = named(dict(zip(names, args, strict=False)) | options)

    def __getitem__(self, name):
        return self.given[name]


def named(given):
    """Arguments by name; the fields of a named tuple by theirs, after the name of what is no size and no constant."""
    flat = {}
    for name, value in given.items():
        if hasattr(value, "_asdict"):
            fields = named(value._asdict())
            if name in ("tile", "rules"):
                flat |= {k: v for k, v in fields.items() if v is not None}  # None: the kernel does not depend on it
            else:
                flat |= {f"{name}.{k}": v for k, v in fields.items()}
        else:
            flat[name] = value
    return flat


@pytest.fixture
def record(monkeypatch):
    launches = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *a, **o: launches.append(Launch(kernel, grid, a, o)))
    monkeypatch.setattr(launcher, "sms_of", lambda tensor: H200)
    monkeypatch.setattr(launcher, "arch_of", lambda tensor: 90)
    monkeypatch.setattr(launcher, "deterministic", lambda: False)
    return launches


def call(record, size, dtype=torch.bfloat16, labels=None, queue=0, part=(0, -1), logq=None, **arguments):
    """Return the launches of a forward and its backward over ``part`` = (first, count) of the samples."""
    views = list(torch.zeros(size, dtype=dtype).unbind(0))
    zq = torch.zeros(queue, size[2], dtype=dtype) if queue else None
    arguments = {"reduction": "mean"} | arguments
    known = info_nce_call(views, labels, zq, first=part[0], count=part[1], **arguments)
    ids = arguments.get("duplicates", labels)
    loss, *saved = ops.overload("info_nce_forward", "triton")(views, ids, logq, zq, None, *known)
    forward = record.copy()
    record.clear()
    ops.overload("info_nce_backward", "triton")(torch.ones_like(loss), *saved, ids, *known, False, dtype)
    return forward, record.copy()


@pytest.mark.parametrize(
    ("kernel", "numbers"),
    [
        ("sums_kernel", (Sizes, SumsWork)),
        ("gradient_kernel", (Sizes, GradientWork)),
        ("wave_kernel", (Sizes,)),
        ("view_tables_kernel", (Sizes,)),
        ("class_tables_kernel", (Sizes,)),
        ("load_rows_kernel", (Source,)),
        ("finish_rows_kernel", (Finish,)),
        ("siglip_wave_kernel", (SiglipWave,)),
        ("siglip_finish_kernel", (PairedRows,)),
    ],
)
def test_kernels_take_the_numbers_in_the_order_of_their_tuples(kernel, numbers):
    names = list(inspect.signature(getattr(kernels, kernel).fn).parameters)
    for record in numbers:
        begin = names.index(record._fields[0])
        assert names[begin : begin + len(record._fields)] == list(record._fields)


def names(launches):
    return [launch.name for launch in launches]


def test_few_rows_are_few_launches(record):
    forward, backward = call(record, (2, 256, 128))
    assert names(forward) == ["load_rows", "sums", "view_tables"]
    assert names(backward) == ["gradient", "finish_rows"]
    assert forward[1]["PART"] == backward[0]["PART"] == "all"
    assert backward[0].grid[1] > 1  # several programs share the columns of a block of rows


def test_many_rows_leave_the_masks_to_kernels_of_their_own(record):
    forward, backward = call(record, (2, 8192, 128))
    assert names(forward) == ["load_rows", "sums", "sums", "view_tables"]
    assert [k["PART"] for k in forward[1:3]] == ["clean", "masked"]
    assert names(backward) == ["gradient", "gradient", "finish_rows"]
    clean, masked, finish = backward
    assert clean.grid == (2 * 8192 // clean["BLOCK_M"], 1)
    assert masked.grid == (2 * 8192 // masked["BLOCK_M"], 1)
    assert (clean["slot"], masked["slot"], finish["splits"], finish["queues"]) == (0, 1, 2, 0)
    assert finish["partial"].shape == (2, 2 * 8192, 128)
    # Only the clean part limits the registers, and so sets the number of programs per SM.
    config = configs.lookup("sums", 90, torch.bfloat16, 128)
    assert [k.options.get("maxnreg") for k in forward[1:3]] == [config.registers, 255]
    assert forward[1].grid == (H200 * config.programs,)


def test_a_launch_adds_up_as_many_columns_as_tensor_cores_may(record):
    """The launches cover every block once, and no accumulator sums more columns than the limit."""
    _, backward = call(record, (2, 100_000, 16), queue=70_000)
    gradients = [k for k in backward if k.name == "gradient"]
    for part in ("clean", "masked"):
        launches = [k for k in gradients if k["PART"] == part]
        ends = [(k["begin"], k["end"]) for k in launches]
        assert len(ends) > 1
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] * launches[0]["BLOCK_N"] >= 100_000
        assert all(2 * launches[0]["BLOCK_N"] * (end - begin) <= MOST_COLUMNS for begin, end in ends)


def test_deterministic_mode_gives_a_program_all_columns_of_its_rows(record, monkeypatch):
    monkeypatch.setattr(launcher, "deterministic", lambda: True)
    forward, _ = call(record, (2, 8192, 128), queue=300)
    (sums,) = [k for k in forward if k.name == "sums"]
    blocks = 8192 // sums["BLOCK_N"]
    assert not sums["SYMMETRIC"]
    assert sums["chunk"] >= blocks
    assert sums["items"] == blocks * 2 * 3


@pytest.mark.parametrize("objective", ["supcon_out", "cross_view"])
@pytest.mark.parametrize("core", [-1, 1])
@pytest.mark.parametrize(("batch", "many"), [(300, 16), (300, 0), (512, 0), (700, 0), (700, 16)])
def test_items_cover_every_pair_once(record, monkeypatch, objective, core, batch, many):
    """Each row meets each column once over all launches; the items are decoded as in the kernel."""
    monkeypatch.setattr(launcher, "MANY_TILES", many)
    num_views, queue = 3, 400
    forward, _ = call(record, (num_views, batch, 64), objective=objective, core_view=core, queue=queue)
    launches = [k for k in forward if k.name == "sums"]
    assert [k["PART"] for k in launches] == (["all"] if many else ["clean", "masked"])
    seen = Counter()
    for sums in launches:
        for item in range(sums["items"]):
            seen.update(visits(item, batch, queue, num_views, core, sums))
    rows, columns = -(-batch // UNIT), -(-queue // UNIT)
    want = Counter()
    for u in range(num_views):
        for i in range(rows):
            for v in range(num_views):
                if (core < 0 or u == v or core in (u, v)) and not (u == v and objective == "cross_view"):
                    want.update(((u, i), (v, j)) for j in range(rows))
            want.update(((u, i), (num_views, j)) for j in range(columns))
    assert {k: n for k, n in seen.items() if k[0][1] < rows and k[1][1] < (columns if k[1][0] == 3 else rows)} == want


UNIT = 32
"""Rows: a piece of every tile's side."""


def visits(item, batch, queue, num_views, core, sums):
    """Yield ((view, unit of rows), (view, unit of columns)) of each pair that a work item adds to the rows' sums, as
    ``sums_kernel`` does."""
    span, chunk = sums["SPAN_N"], sums["chunk"]
    n, q = -(-batch // span), -(-queue // span)
    item, piece = divmod(item, span // sums["BLOCK_N"])
    own_length = n // 2 + 1
    own = 0 if sums["columns"] == Columns.OTHER else num_views * n * -(-own_length // chunk)
    pairs = num_views * (num_views - 1) // 2 if core < 0 else num_views - 1
    cross = pairs * n * -(-n // chunk)
    block = item % n
    if item < own:
        u = v = item // (own // num_views)
        first = item % (own // num_views) // n * chunk
        length = own_length - (n % 2 == 0 and block >= n // 2)
    elif item < own + cross:
        pair, rest = divmod(item - own, cross // pairs)
        u, step = (pair % num_views, pair // num_views) if core < 0 else (core, pair)
        v, first, length = (u + step + 1) % num_views, rest // n * chunk, n
    else:
        u, rest = divmod(item - own - cross, n * -(-q // chunk))
        v, first, length = num_views, rest // n * chunk, q
    for offset in range(first, min(first + chunk, length)):
        is_clean = v == num_views or (offset >= 1 and block * span + span <= batch)
        if sums["PART"] != "all" and (sums["PART"] == "clean") != is_clean:
            continue
        x_block = offset if v == num_views else (block + offset) % n
        ys = range(
            (block * span + piece * sums["BLOCK_N"]) // UNIT, (block * span + (piece + 1) * sums["BLOCK_N"]) // UNIT
        )
        for x in range(x_block * span // UNIT, (x_block + 1) * span // UNIT):
            for y in ys:
                yield (u, y), (v, x)
                if v != num_views and (u != v or x_block != block):
                    yield (v, x), (u, y)


@pytest.mark.parametrize("core", [-1, 1])
@pytest.mark.parametrize("many", [0, 10**6])
def test_items_of_a_part_cover_its_pairs_once(record, monkeypatch, many, core):
    monkeypatch.setattr(launcher, "MANY_TILES", many)
    num_views, batch, queue, (first, count) = 3, 2000, 400, (500, 300)
    forward, backward = call(record, (num_views, batch, 64), core_view=core, queue=queue, part=(first, count))
    launches = [k for k in forward if k.name == "sums"]
    assert [k["PART"] for k in launches] == (["all"] if many else ["clean", "masked"])
    seen = Counter()
    for sums in launches:
        span, chunk, own = sums["SPAN_N"], sums["chunk"], sums["own_blocks"]
        n, q = -(-batch // span), -(-queue // span)
        chunks = -(-max(n, q) // chunk)
        for item in range(sums["items"]):
            item, piece = divmod(item, span // sums["BLOCK_N"])
            block, u, rest = sums["first_block"] + item % own, item // own % num_views, item // own // num_views
            piece_of_columns, v = rest % chunks, rest // chunks
            if not (core < 0 or u == v or core in (u, v) or v == num_views):
                continue
            for offset in range(piece_of_columns * chunk, min((piece_of_columns + 1) * chunk, q if v == 3 else n)):
                if sums["PART"] == "all" or (sums["PART"] == "clean") == (v == num_views or offset >= 1):
                    column = offset if v == num_views else (block + offset) % n
                    rows = range(piece * sums["BLOCK_N"] // UNIT, (piece + 1) * sums["BLOCK_N"] // UNIT)
                    seen.update((u, block, row, v, column) for row in rows)
    blocks = range(first // span, -(-(first + count) // span))
    want = {
        (u, block, row, v, column)
        for u in range(num_views)
        for block in blocks
        for row in range(span // UNIT)
        for v in range(num_views + 1)
        if core < 0 or u == v or core in (u, v) or v == num_views
        for column in range(q if v == num_views else n)
    }
    assert seen == dict.fromkeys(want, 1)
    for gradient in backward[:-1]:
        side = gradient["BLOCK_M"]
        own = -(-(first + count) // side) - first // side
        assert (gradient["first_block"], gradient["own_blocks"]) == (first // side, own)
        assert gradient.grid[0] == num_views * own
        # Memory for 256 to 1024 stored rows per view, around the process's own, and not for all processes' rows.
        assert (gradient["part_first"], gradient["part_rows"]) == (256, 768)
        assert gradient["partial"].shape[1:] == (num_views * 768, 64)


@pytest.mark.parametrize(("batch", "queue", "labelled"), [(1000, 0, False), (1000, 300, False), (700, 300, True)])
def test_waves_visit_every_pair_of_rows(record, monkeypatch, batch, queue, labelled):
    monkeypatch.setattr("selfsup_kernels.tiles.waves.WORKSPACE_BYTES", 1 << 17)  # several waves
    labels = random_labels(batch, 9) if labelled else None
    _, backward = call(record, (2, batch, 512), queue=queue, labels=labels)
    assert names(backward) == ["wave", "product"] * (len(backward) // 2) + ["finish_rows"]
    waves, products = backward[0:-1:2], backward[1:-1:2]
    views, rows = (1, 2 * batch) if labelled else (2, batch)
    columns = dict.fromkeys(range(views), rows) | ({views: queue} if queue else {})
    visited, started = {}, set()
    for wave, product in zip(waves, products, strict=True):
        assert product["x_row"] == wave["u"] * wave["padded"] + wave["x_first"]
        assert product["y_row"] == wave["v"] * wave["padded"] + wave["y_first"]
        assert wave.grid[1] * wave["BLOCK_M"] >= product["x_count"]
        assert wave.grid[0] * wave["BLOCK_N"] >= product["columns"]
        assert max(wave["workspace"].shape) <= PADDING * 32
        key = (wave["u"], wave["v"] == views, wave["x_first"])
        assert product["FIRST"] == (key not in started)  # the first product of a row block overwrites the output
        started.add(key)
        cell = visited.setdefault((wave["u"], wave["v"]), [])
        cell.append((wave["x_first"], product["x_count"], wave["y_first"], product["columns"]))
    for u in range(views):
        for v, count in columns.items():
            assert sum(x * y for _, x, _, y in visited[u, v]) == rows * count
            assert len(set(visited[u, v])) == len(visited[u, v])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 512), (torch.bfloat16, 4096), (torch.float32, 128)])
def test_a_wave_fills_the_machine(record, dtype, dim):
    """The tiles of a product keep nearly all SMs busy, with the last round counted as a full one."""
    _, backward = call(record, (2, 16384, dim), dtype)
    products = [k for k in backward if k.name == "product"]
    tiles = [k.grid[0] * k.grid[1] for k in products]
    assert all(n > 0.9 * H200 * math.ceil(n / H200) for n in tiles)
    source = products[0]["source_g"]
    height, width = getattr(source, "base", source).shape
    assert height * width * dtype.itemsize <= waves.WORKSPACE_BYTES
    assert min(height, width) >= 512


def test_labels_make_one_view_of_all(record):
    forward, backward = call(record, (2, 100, 32), labels=random_labels(100, 7))
    assert names(forward) == ["sort", "load_rows", "sums", "class_tables"]
    assert names(backward) == ["gradient", "finish_rows"]
    assert forward[2]["views"] == 1
    assert forward[2]["batch"] == 200
    assert backward[1]["views"] == 2


def test_duplicates_and_logq_take_no_launch_of_their_own(record):
    ids, logq = torch.arange(100) % 7, torch.zeros(2, 100)
    forward, backward = call(record, (2, 100, 32), duplicates=ids, logq=logq)
    assert names(forward) == ["load_rows", "sums", "view_tables"]
    assert names(backward) == ["gradient", "finish_rows"]


def test_labels_across_views_keep_the_views_apart(record):
    forward, backward = call(record, (2, 100, 32), labels=random_labels(100, 7), objective="cross_view")
    assert names(forward) == ["load_rows", "sort", "sums", "view_tables"]
    assert names(backward) == ["gradient", "finish_rows"]
    assert (forward[2]["views"], forward[2]["batch"]) == (2, 100)


def test_the_queue_is_stored_behind_the_views(record):
    forward, backward = call(record, (2, 300, 32), queue=70)
    assert names(forward) == ["load_rows", "load_rows", "sums", "view_tables"]
    queue, views = forward[:2]
    assert (queue["first_row"], queue["rows"], queue["columns"]) == (1024, 256, 0)
    assert (views["first_row"], views["rows"], views["columns"]) == (0, 1024, 3)
    assert views["saved.rows"].shape == (1280, 32)
    assert backward[0]["queue"] == 70  # without padding
    assert backward[1]["queues"] == 1


def test_memory_is_linear_in_the_rows(record):
    """No launch gets a quadratic tensor; at M = 65536 the similarity matrix would have 4.3e9 numbers."""
    for dim in (64, 512):
        forward, backward = call(record, (2, 32768, dim))
        for launch in forward + backward:
            for value in launch.given.values():
                if isinstance(value, torch.Tensor):
                    assert value.numel() <= max(4 * 65536 * dim, 16 << 20)


def test_offsets_pass_2_31(record):
    """Offsets may exceed 2^31, row numbers may not (see also the tests that need a GPU)."""
    views = [torch.zeros(1, 1).expand(3_000_000, 1024)] * 2
    layout = Layout(info_nce_call(views))
    assert layout.rows * layout.stride > 2**31
    assert layout.rows < 2**31
    views = list(torch.zeros(1, 1).expand(50_000, 1).expand(300, 50_000, 1).unbind(0))
    with pytest.raises(RuntimeError, match=r"2\^31.*reference"):
        ops.overload("info_nce_forward", "triton")(views, None, None, None, None, *info_nce_call(views))


def test_saved_tensors_are_what_the_fakes_say(impl, device):
    ids, zq, logq = torch.arange(20) % 3, torch.zeros(7, 12), torch.zeros(2, 20)
    views = list(torch.randn(2, 20, 12).to(device).unbind(0))
    for objective in ("supcon_out", "cross_view"):
        for kind in (None, "labels", "duplicates"):
            for queue, q in ((None, None), (zq, None), (None, logq)):
                known = info_nce_call(views, queue=queue, objective=objective, **{kind: ids} if kind else {})
                tensors = [t if t is None else t.to(device) for t in (ids if kind else None, q, queue, None)]
                real = ops.overload("info_nce_forward", impl)(views, *tensors, *known)
                fake = forward_fake_triton(views, *tensors, *known)
                assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


def test_the_tuner_measures_what_the_launchers_launch(monkeypatch):
    """Everything but the clock: the launches of a call with a candidate, made once more."""
    if not launcher.INTERPRETED:
        pytest.skip("on a GPU the tuner runs as it is")
    run_op, times = tune.run_op, []
    monkeypatch.setattr(tune, "run_op", lambda task, rows, device: run_op(task, rows, "cpu"))
    monkeypatch.setattr(tune.triton.testing, "do_bench", lambda again, **options: times.append(again()) or 1.5)
    monkeypatch.setattr(backends, "select", lambda *_, **__: "triton")
    task = tune.Task("masked_sums", "half", 64)
    config = configs.lookup("masked_sums", 90, torch.bfloat16, 64)
    assert tune.measure(task, config, 256) == 1.5
    assert len(times) == 1
