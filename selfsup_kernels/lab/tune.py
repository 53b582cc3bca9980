"""``python -m selfsup_kernels tune``: measure tile shapes of the InfoNCE kernels on this GPU, and write the table.

For each kernel, kind of numbers and width of rows: generate candidates; compile them all, and drop those that spill or
do not fit (on the CPU, in several processes; what was compiled is in Triton's cache afterwards); measure the rest at
two sizes; take the fastest. None of this happens inside a user's step.
"""

import copy
import json
import math
import multiprocessing
import os
import re
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

import selfsup_kernels as sk
from selfsup_kernels.lab import machine_code, sass
from selfsup_kernels.tiles import configs, launcher

OPS = ("sums", "masked_sums", "gradient", "masked_gradient", "wave", "masked_wave", "product")
"""Masked ones are the tiles on the diagonal, and all tiles of small batches (of waves: those with labels)."""
KINDS = {
    "half": (torch.bfloat16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
"""Second key of the table -> (dtype, torch.set_float32_matmul_precision). A table has some of these."""
DIMS = (*configs.WIDTHS, 1024)
LARGE, SMALL = (65536, 32768), (4096, 1024)
"""Rows of two views together at which a kernel is measured: large calls have nearly all tiles without masks, small ones
are a single launch of the masked kernel."""
LEAST, MOST = 32, 160
"""Accumulators per thread. Below the first bound a tile does less work than its loads cost; above the second no
register is left for anything else. On sm_100, where accumulators lie in tensor memory, the upper bound is doubled."""


class Task(NamedTuple):
    """One entry of the table."""

    kernel: str
    kind: str
    dim: int

    @property
    def name(self):
        return f"{self.kernel} {self.kind} {configs.width_of(self.dim)}"

    @property
    def base(self):
        """Return sums, gradient, wave or product."""
        return self.kernel.removeprefix("masked_")

    @property
    def masked(self):
        return self.kernel != self.base

    @property
    def rows(self):
        return SMALL if self.masked and self.base != "wave" else LARGE

    def entry(self, table, architecture) -> configs.Config:
        """Return the configuration that the table has."""
        entries = table[f"sm_{known(architecture)}"]
        return configs.Config(**entries[self.kernel][self.kind][configs.width_of(self.dim)])

    def launches(self, function, constants):
        """Return whether a launch with these constants is of this entry."""
        masked = constants.get("PART", "clean" if not self.masked else "masked") != "clean"
        return function == f"{self.base}_kernel" and masked == self.masked

    def overriding(self, config):
        """Let the launchers use ``config`` for this kernel. They take the waves where there is no ``gradient``."""
        waves = {"gradient": None} if self.base in ("wave", "product") else {}
        return configs.override({self.kernel: config} | waves)


class Measured(NamedTuple):
    config: configs.Config
    times: tuple[float, ...]
    """Milliseconds, for each of ``Task.rows``."""


def known(architecture: int) -> int:
    """Return the architecture whose entries a device uses."""
    return max((a for a in configs.ARCHITECTURES if a <= architecture), default=configs.ARCHITECTURES[0])


def tasks(table: dict, architecture: int, kernels=OPS, kinds=tuple(KINDS), dims=DIMS) -> list[Task]:
    """Return the entries that the table has: where it has none the launchers go another way."""
    entries = table[f"sm_{known(architecture)}"]
    found = [Task(*names) for names in product(kernels, kinds, dims)]
    return [t for t in found if configs.width_of(t.dim) in entries.get(t.kernel, {}).get(t.kind, {})]


def candidates(task: Task, architecture: int, shipped: configs.Config) -> list[configs.Config]:
    """Return ``shipped``, so that it is measured whatever the time is, then some tens that are worth trying."""
    half, gradient, sums = task.kind == "half", task.base == "gradient", task.base == "sums"
    whole = max(16, 1 << (task.dim - 1).bit_length())
    pieces = (64, 128) if half else (32, 64)
    if configs.width_of(task.dim) == "long" and task.base != "product":
        pieces = tuple(k for k in pieces if k <= 64)  # rows have a multiple of 64 numbers
    if gradient or (sums and whole < pieces[-1]):
        depths = (whole,)
    else:
        depths = (whole, pieces[0]) if sums and configs.width_of(task.dim) != "long" else pieces
    blocks = (32, 64, 128) if gradient else (64, 128, 256)
    descriptors = (True, False) if architecture >= 90 else (False,)
    # Programs on a multiprocessor are chosen where the grid is persistent; four warps alone there leave it idle.
    crowds = ((8, 1), (4, 2), (4, 3), (8, 2)) if sums else ((8, 1), (4, 1))
    limit = machine_code.RESOURCES[architecture].block_shared
    most = 2 * MOST if architecture == 100 else MOST
    found = [shipped]
    for m, n, k, (warps, programs), stages, descriptor in product(
        blocks, blocks, dict.fromkeys(depths), crowds, (2, 3, 4, 1), descriptors
    ):
        held = m * n + (m * k if gradient else 0)
        streamed = k < whole or task.base in ("wave", "product")
        loaded = stages * (m + n) * k if streamed else m * k + stages * n * k
        if (
            LEAST <= held / (32 * warps) <= most
            and loaded * (2 if half else 4) * programs <= limit
            # A block of columns is walked through in whole blocks of rows.
            and (not sums or n % m == 0)
            # With one stage nothing is loaded ahead.
            and (stages > 1 or (not streamed and programs > 1))
            # Whether descriptors pay at all shows at one depth of the pipeline.
            and (descriptor or architecture < 90 or stages == 3)
        ):
            registers = min(255, machine_code.REGISTERS // (32 * warps * programs) // 8 * 8)
            found.append(configs.Config(m, n, k, warps, stages, descriptor, registers, programs))
    return list(dict.fromkeys(found))


def run_op(task: Task, rows: int, device="cpu") -> None:
    """Make a user's call that launches the task's kernel."""
    dtype, precision = KINDS[task.kind]
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    try:
        make = torch.zeros if device == "cpu" else torch.randn
        views = [make(rows // 2, task.dim, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
        labels = torch.arange(rows // 2, device=device) if task.kernel == "masked_wave" else None
        loss = sk.info_nce_loss(views, temperature=0.1, labels=labels, impl="triton")
        if task.base != "sums":
            loss.backward()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


UNUSED = "the launchers do not use it"


def objections(task: Task, config: configs.Config, architecture: int) -> list[str]:
    """Return why the configuration is not measured; empty where it is."""
    wanted = f"{task.base}_kernel".__eq__
    try:
        with task.overriding(config), machine_code.recording(architecture, wanted) as launches:
            run_op(task, task.rows[0])
    except Exception as error:  # a launcher may refuse a shape
        return [f"{type(error).__name__}: {error}"]
    own = [x for x in launches if task.launches(x.kernel, x.constants)]
    if not own:
        return [UNUSED]
    found = [problem for x in own for problem in machine_code.problems(x, architecture)]
    if not found and min(machine_code.occupancy(x.code, x.warps, architecture) for x in own) < config.programs:
        found = [f"{config.programs} programs do not fit"]
    return found


def filter_candidates(task, found, architecture: int, pool=None):
    """Return the configurations to be measured, and how many were dropped for which reason."""
    work = zip(*((task, config, architecture) for config in found), strict=True)
    verdicts = list(pool.map(objections, *work, chunksize=2) if pool else map(objections, *work))
    # Numbers differ from one configuration to the next, and are no reasons of their own.
    dropped = Counter(re.sub(r"\d+", "N", verdict[0].split(": ")[0]) for verdict in verdicts if verdict)
    return [config for config, verdict in zip(found, verdicts, strict=True) if not verdict], dropped


def measure(task: Task, config: configs.Config, rows: int) -> float:
    """Return the median of the kernel's own time in ms, all its launches of one call together, on the CUDA device."""
    launches = []

    def keep(kernel, grid, *args, **options):
        launched = launcher.kernel_of(kernel)[grid], [*map(launcher.for_triton, args)], options
        launched[0](*launched[1], **options)
        if task.launches(kernel, options):
            launches.append(launched)

    with mock.patch.object(launcher, "launch", keep), task.overriding(config):
        run_op(task, rows, "cuda")
    if not launches:
        raise RuntimeError(UNUSED)

    def again():
        for kernel, args, options in launches:
            kernel(*args, **options)

    return triton.testing.do_bench(again, warmup=5, rep=25, return_mode="median")


def tune(task: Task, table: dict, architecture: int, timer, *, until=math.inf, pool=None):
    """Measure by ``timer(task, configuration, rows)`` every candidate that is begun before the clock shows ``until``.

    Returns:
        ([Measured, fastest first], how many candidates were dropped for which reason)
    """
    shipped = task.entry(table, architecture)
    found, dropped = filter_candidates(task, candidates(task, known(architecture), shipped), known(architecture), pool)
    results, unmeasured = [], 0
    for config in found:
        if results and time.monotonic() > until:
            unmeasured += 1
            continue
        try:
            results.append(Measured(config, tuple(timer(task, config, rows) for rows in task.rows)))
        except Exception as error:  # what compiles may still be refused at the launch
            dropped[type(error).__name__] += 1
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
    late = f", {unmeasured} left for want of time" if unmeasured else ""
    print(f"{task.name}: {len(results)} measured, {dropped.total()} dropped ({why or 'none'}){late}", flush=True)
    # By the geometric mean: a tenth counts as much at one size as at the other.
    return sorted(results, key=lambda m: math.prod(m.times)), dropped


def merged(table: dict, architecture: int, chosen: dict[Task, configs.Config]) -> dict:
    """Return ``table`` with these entries in place of its own."""
    result = copy.deepcopy(table)
    entries = result[f"sm_{known(architecture)}"]
    for task, config in chosen.items():
        # The defaults that the old entry leaves out may matter now.
        entries[task.kernel][task.kind][configs.width_of(task.dim)] |= config._asdict()
    before = table[f"sm_{known(architecture)}"]
    for kernel, kind in product(("sums", "gradient"), KINDS):
        # Tiles with masks must divide those without, and each was chosen alone: where they do not, both stay.
        pair = [entries.get(name, {}).get(kind, {}) for name in (kernel, f"masked_{kernel}")]
        for width in pair[0].keys() & pair[1].keys():
            try:
                configs.check_divides(kernel, *(configs.Config(**part[width]) for part in pair))
            except ValueError:
                for name, part in zip((kernel, f"masked_{kernel}"), pair, strict=True):
                    part[width] = before[name][kind][width]
    return result


def formatted(table: dict) -> str:
    """Write JSON with a line for each entry, so that a change of an entry is a change of one line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s*(\"block_m\"[^{}]*?)\s*\}", lambda m: "{ " + " ".join(m[1].split()) + " }", text) + "\n"


def write(text: str, path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def run(table: dict, architecture: int, todo: list[Task], timer, minutes: float, pool=None, keep=None):
    """Measure every task, each with an equal share of the time that is left, print, and return the choices.

    After each, ``keep`` gets everything that was measured as data: the slow ones say why the fast one is fast.
    """
    end = time.monotonic() + 60 * minutes
    chosen, lines, entries = {}, [], {}
    for i, task in enumerate(todo):
        now = time.monotonic()
        if now > end:
            print(f"no time was left for {len(todo) - i} entries, from {task.name} on: give more --minutes", flush=True)
            break
        until = now + (end - now) / (len(todo) - i)
        measured, dropped = tune(task, table, architecture, timer, until=until, pool=pool)
        shipped = task.entry(table, architecture)
        rows = [m.config._asdict() | {"ms": m.times, "shipped": m.config == shipped} for m in measured]
        entries[task.name] = {"dim": task.dim, "rows": task.rows, "measured": rows, "dropped": dropped}
        if keep:
            keep(entries)
        if measured:
            best, before = measured[0], next((m for m in measured if m.config == shipped), None)
            chosen[task] = c = best.config
            tile = f"{c.block_m}x{c.block_n}x{c.block_k}", f"{c.num_warps}/{c.num_stages}", str(c.descriptor)
            ms = ", ".join(f"{ms:.3f} (M={rows})" for ms, rows in zip(best.times, task.rows, strict=True))
            mean = statistics.geometric_mean
            gain = f"{mean(before.times) / mean(best.times):.2f}x" if before else "not measured"
            lines.append([task.name, *tile, str(c.programs), ms, gain])
    if lines:
        sass.print_table(("entry", "tile", "warps/stages", "TMA", "programs", "ms", "shipped"), lines)
    return chosen


def refusal(kernels, kinds, write_table) -> str | None:
    """Return why the command cannot measure, in one line."""
    for name, given, choices in (("--op", kernels, OPS), ("--dtype", kinds, KINDS)):
        if wrong := [x for x in given or () if x not in choices]:
            return f"{name}: expected some of {', '.join(choices)}, got {', '.join(wrong)}"
    if not torch.cuda.is_available():
        return f"needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees no GPU"
    architecture = launcher.architecture(torch.cuda.current_device())
    if write_table and architecture not in configs.ARCHITECTURES:
        return f"--write is for {configs.ARCHITECTURES}, this is {architecture}; use --out FILE"
    if write_table and not (configs.TABLE.parents[2] / "pyproject.toml").exists():
        return "--write changes a checkout of the sources, and this package is installed elsewhere; use --out FILE"
    return machine_code.available()


def main(kernels=None, kinds=None, dims=None, out=None, write_table=False, minutes=8.0, log=None) -> int:
    """Run the command. Returns 2 where it cannot measure."""
    if reason := refusal(kernels, kinds, write_table):
        print(f"tune: {reason}")
        return 2
    architecture, table = launcher.architecture(torch.cuda.current_device()), configs._table()
    todo = tasks(table, architecture, kernels or OPS, kinds or tuple(KINDS), dims or DIMS)
    if not todo:
        print("tune: the table has no such entries")
        return 2
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def keep(entries):
        if log:
            write(json.dumps(facts | {"entries": entries}, indent=1) + "\n", log)

    processes = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        chosen = run(table, architecture, todo, measure, minutes, pool, keep)
    if not chosen:
        return 1
    for path in filter(None, (out, configs.TABLE if write_table else None)):
        write(formatted(merged(table, architecture, chosen)), path)
        print(f"wrote {path}")
    if not (out or write_table):
        print(f"nothing was written: give --out FILE (to be named by {configs.ENVIRONMENT}), or --write in a checkout")
    return 0
