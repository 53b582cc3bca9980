"""``python -m selfsup_kernels tune``: measures tile shapes of the InfoNCE kernels on this GPU, and writes the table.

For each kernel, kind of numbers and width of rows: generate candidates; compile them all, and drop those that spill or
do not fit (on the CPU, in several processes; what was compiled is in Triton's cache afterwards); measure the rest at
two sizes; take the fastest. Nothing of this happens inside a user's step.
"""

import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import selfsup_kernels as sk
from selfsup_kernels.lab import machine_code
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
"""Accumulators of a thread: with fewer a tile is not worth its loads, with more no register is left for the rest (on
sm_100 they lie in a memory of their own)."""


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
        """sums, gradient, wave or product."""
        return self.kernel.removeprefix("masked_")

    @property
    def masked(self):
        return self.kernel != self.base

    @property
    def rows(self):
        return SMALL if self.masked and self.base != "wave" else LARGE

    def launches(self, function, constants):
        """Whether a launch with these constants is of this entry."""
        masked = constants.get("PART", "clean" if not self.masked else "masked") != "clean"
        return function == f"{self.base}_kernel" and masked == self.masked


class Measured(NamedTuple):
    config: configs.Config
    times: tuple[float, ...]
    """Milliseconds, for each of ``Task.rows``."""

    @property
    def score(self):
        """The geometric mean: a tenth counts as much at one size as at the other."""
        return math.prod(self.times) ** (1 / len(self.times))


class Log:
    """Everything that was measured, as data: the slow ones too, since they say why the fast one is fast. The file is
    whole after every entry."""

    def __init__(self, path: Path, **facts):
        self.path, self.facts, self.entries = path, facts, {}

    def add(self, task: Task, measured: list[Measured], dropped: Counter, shipped: configs.Config) -> None:
        rows = [m.config._asdict() | {"ms": m.times, "shipped": m.config == shipped} for m in measured]
        self.entries[task.name] = {"dim": task.dim, "rows": task.rows, "measured": rows, "dropped": dropped}
        write(json.dumps(self.facts | {"entries": self.entries}, indent=1) + "\n", self.path)


Timer = Callable[[Task, configs.Config, int], float]
"""(task, configuration, rows) -> milliseconds."""


def known(architecture: int) -> int:
    """The architecture whose entries a device uses."""
    return max((a for a in configs.ARCHITECTURES if a <= architecture), default=configs.ARCHITECTURES[0])


def tasks(table: dict, architecture: int, kernels=OPS, kinds=tuple(KINDS), dims=DIMS) -> list[Task]:
    """The entries that the table has: where it has none the launchers go another way."""
    entries = table[f"sm_{known(architecture)}"]
    return [
        Task(kernel, kind, dim)
        for kernel, kind, dim in itertools.product(kernels, kinds, dims)
        if configs.width_of(dim) in entries.get(kernel, {}).get(kind, {})
    ]


def candidates(task: Task, architecture: int, shipped: configs.Config) -> list[configs.Config]:
    """``shipped`` first, so that it is measured whatever the time is; then some tens that are worth trying."""
    half = task.kind == "half"
    whole = max(16, 1 << (task.dim - 1).bit_length())
    pieces = (32, 64, 128) if half else (16, 32, 64)
    if task.base == "gradient" or (task.base == "sums" and whole < (128 if half else 64)):
        depths = (whole,)
    elif task.base == "sums" and configs.width_of(task.dim) != "long":
        depths = (whole, pieces[1])
    else:
        depths = pieces[1:]
    blocks = (32, 64, 128) if task.base == "gradient" else (64, 128, 256)
    descriptors = (True, False) if architecture >= 90 else (False,)
    # Programs on a multiprocessor are chosen where the grid is persistent; four warps alone there leave it idle.
    crowds = ((8, 1), (4, 2), (4, 3), (8, 2)) if task.base == "sums" else ((8, 1), (4, 1))
    limit = machine_code.RESOURCES[architecture].block_shared
    found = [shipped]
    for m, n, k, (warps, programs), stages, descriptor in itertools.product(
        blocks, blocks, dict.fromkeys(depths), crowds, (2, 3, 4, 1), descriptors
    ):
        held = m * n + (m * k if task.base == "gradient" else 0)
        if not LEAST <= held / (32 * warps) <= (2 * MOST if architecture == 100 else MOST):
            continue
        if task.base == "sums" and n % m:
            continue  # a block of columns is walked through in whole blocks of rows
        streamed = k < whole or task.base in ("wave", "product")
        if stages == 1 and (streamed or programs == 1):
            continue  # nothing would be loaded ahead
        if not descriptor and architecture >= 90 and stages != 3:
            continue  # whether descriptors pay at all shows at one depth of the pipeline
        loaded = stages * (m + n) * k if streamed else m * k + stages * n * k
        if loaded * (2 if half else 4) * programs > limit:
            continue
        most = min(255, machine_code.REGISTERS // (32 * warps * programs) // 8 * 8)
        config = configs.Config(m, n, k, warps, stages, descriptor, registers=most, programs=programs)
        if config not in found:
            found.append(config)
    return found


def run_op(task: Task, rows: int, device="cpu") -> None:
    """A user's call that launches the task's kernel."""
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


def overriding(task: Task, config: configs.Config):
    """The launchers use ``config`` for the task's kernel. The waves are what is left where there is no ``gradient``."""
    chosen = {task.kernel: config}
    if task.base in ("wave", "product"):
        chosen["gradient"] = None
    return configs.override(chosen)


UNUSED = "the launchers do not use it"


def objections(task: Task, config: configs.Config, architecture: int) -> list[str]:
    """Why the configuration is not measured; none: it is."""
    function = f"{task.base}_kernel"
    try:
        with (
            overriding(task, config),
            machine_code.recording(architecture, lambda kernel: kernel == function) as launches,
        ):
            run_op(task, task.rows[0])
    except Exception as error:  # a launcher may refuse a shape; that is an answer
        return [f"{type(error).__name__}: {error}"]
    own = [x for x in launches if task.launches(x.kernel, x.constants)]
    if not own:
        return [UNUSED]
    found = [problem for x in own for problem in machine_code.problems(x, architecture)]
    if not found and min(machine_code.occupancy(x.code, x.warps, architecture) for x in own) < config.programs:
        found = [f"{config.programs} programs do not fit"]
    return found


def filter_candidates(task, found: Iterable[configs.Config], architecture: int, pool: Executor | None = None):
    """(the configurations to be measured, how many were dropped for which reason)."""
    found = list(found)
    work = zip(*((task, config, architecture) for config in found), strict=True)
    verdicts = list(pool.map(objections, *work, chunksize=2) if pool else map(objections, *work))
    dropped = Counter(_kind_of(verdict[0]) for verdict in verdicts if verdict)
    return [config for config, verdict in zip(found, verdicts, strict=True) if not verdict], dropped


def _kind_of(problem):
    for kind in ("stack frame", "local loads", "shared memory", "programs do not fit", "no "):
        if kind in problem:
            return kind.strip() if kind != "no " else problem
    return problem.split(":")[0]


def measure(task: Task, config: configs.Config, rows: int) -> float:
    """The median of the kernel's own time, all its launches of one call together, on the current CUDA device."""
    launches = []
    launch = launcher.launch

    def keep(kernel, grid, *args, **options):
        launch(kernel, grid, *args, **options)
        if task.launches(kernel.__name__, options):
            launches.append((kernel, grid, args, options))

    launcher.launch = keep
    try:
        with overriding(task, config):
            run_op(task, rows, "cuda")
    finally:
        launcher.launch = launch

    if not launches:
        raise RuntimeError(UNUSED)

    def again():
        for kernel, grid, args, options in launches:
            kernel[grid](*args, **options)

    return triton.testing.do_bench(again, warmup=5, rep=25, return_mode="median")


def matrix_rates() -> dict[str, float]:
    """Operations a second of PyTorch's own matrix product of 8192 x 8192 matrices of random numbers, by kind."""
    rates = {}
    for kind, (dtype, precision) in KINDS.items():
        before = torch.get_float32_matmul_precision()
        # Full float32 is made of TF32 products here, so that these are what it is compared with.
        torch.set_float32_matmul_precision("high" if kind != "half" else precision)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        ms = triton.testing.do_bench(lambda a=a, b=b: a @ b, warmup=20, rep=100, return_mode="median")
        rates[kind] = 2 * 8192**3 / (1e-3 * ms)
        torch.set_float32_matmul_precision(before)
    return rates


def operations(task: Task, rows: int) -> float:
    """Those that the method needs: the forward makes each pair once, the backward both products of each twice."""
    pairs = rows * rows * task.dim
    return {"sums": 1, "gradient": 4, "wave": 2, "product": 2}[task.base] * pairs


def tune(
    task: Task,
    table: dict,
    architecture: int,
    timer: Timer,
    *,
    until: float = math.inf,
    pool: Executor | None = None,
    log: Log | None = None,
) -> list[Measured]:
    """Every candidate that was measured before the clock shows ``until``, fastest first."""
    shipped = configs.Config(**table[f"sm_{known(architecture)}"][task.kernel][task.kind][configs.width_of(task.dim)])
    found, dropped = filter_candidates(task, candidates(task, known(architecture), shipped), known(architecture), pool)
    results, unmeasured = [], 0
    for config in found:
        if results and time.monotonic() > until:
            unmeasured += 1
            continue
        try:
            results.append(Measured(config, tuple(timer(task, config, rows) for rows in task.rows)))
        except Exception as error:  # what compiles may still be refused at the launch
            dropped[f"{type(error).__name__}"] += 1
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
    print(
        f"{task.name}: {len(results)} measured, {sum(dropped.values())} dropped ({why or 'none'})"
        + (f", {unmeasured} left for want of time" if unmeasured else ""),
        flush=True,
    )
    results.sort(key=lambda m: m.score)
    if log:
        log.add(task, results, dropped, shipped)
    return results


def merged(table: dict, architecture: int, chosen: dict[Task, configs.Config]) -> dict:
    """``table`` with these entries in place of its own."""
    result = copy.deepcopy(table)
    entries = result.setdefault(f"sm_{known(architecture)}", {})
    for task, config in chosen.items():
        widths = entries.setdefault(task.kernel, {}).setdefault(task.kind, {})
        old = widths.get(configs.width_of(task.dim), {})
        new = config._asdict()
        widths[configs.width_of(task.dim)] = {name: new[name] for name in [*old, *(n for n in new if n not in old)]}
    _make_divide(entries, table.get(f"sm_{known(architecture)}", {}))
    return result


def _make_divide(entries: dict, before: dict) -> None:
    """Tiles with masks must divide those without, and each was chosen alone: where they do not, the former entries of
    both come back."""
    for kernel, kind in itertools.product(("sums", "gradient"), KINDS):
        masked = f"masked_{kernel}"
        for width, entry in entries.get(kernel, {}).get(kind, {}).items():
            if width not in entries.get(masked, {}).get(kind, {}):
                continue
            try:
                configs.check_divides(kernel, configs.Config(**entry), configs.Config(**entries[masked][kind][width]))
            except ValueError:
                for name in (kernel, masked):
                    entries[name][kind][width] = copy.deepcopy(before[name][kind][width])


def formatted(table: dict) -> str:
    """As JSON, a line for each entry: the table is read by people too, and its changes by line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s*(\"block_m\"[^{}]*?)\s*\}", lambda m: "{ " + " ".join(m[1].split()) + " }", text) + "\n"


def write(text: str, path: Path) -> None:
    """All at once, so that a reader never finds half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def print_results(results: dict[Task, list[Measured]], rates: dict[str, float], shipped: dict) -> None:
    """The fastest of each entry, and how it compares with what is shipped."""
    columns = [
        "entry",
        "tile",
        "warps/stages",
        "programs",
        "ms",
        "of product",
        "shipped",
    ]
    lines = []
    for task, measured in results.items():
        best = measured[0]
        c = best.config
        fraction = operations(task, task.rows[0]) / (1e-3 * best.times[0]) / rates[task.kind]
        before = next((m for m in measured if m.config == shipped.get(task)), None)
        lines.append(
            [
                task.name,
                f"{c.block_m}x{c.block_n}x{c.block_k}",
                f"{c.num_warps}/{c.num_stages}" + (" TMA" if c.descriptor else ""),
                str(c.programs),
                ", ".join(f"{t:.3f} (M={rows})" for t, rows in zip(best.times, task.rows, strict=True)),
                f"{fraction:.0%}",
                f"{before.score / best.score:.2f}x" if before else "not measured",
            ]
        )
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in [columns, *lines]:
            print("  ".join(cell.ljust(14) for cell in line).rstrip())
        return
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def run(
    table: dict, architecture: int, todo: list[Task], timer: Timer, rates: dict[str, float], minutes: float, **options
) -> dict[Task, configs.Config]:
    """Measure every task, each with an equal share of the time that is left; print; the choice for each."""
    end = time.monotonic() + 60 * minutes
    results = {}
    for i, task in enumerate(todo):
        now = time.monotonic()
        if now > end:
            print(f"no time was left for {len(todo) - i} entries, from {task.name} on: give more --minutes", flush=True)
            break
        measured = tune(task, table, architecture, timer, until=now + (end - now) / (len(todo) - i), **options)
        if measured:
            results[task] = measured
    entries = table[f"sm_{known(architecture)}"]
    shipped = {t: configs.Config(**entries[t.kernel][t.kind][configs.width_of(t.dim)]) for t in results}
    if results:
        print_results(results, rates, shipped)
    return {task: measured[0].config for task, measured in results.items()}


def main(kernels=None, kinds=None, dims=None, out=None, write_table=False, minutes=8.0, log=None) -> int:
    """The command. 2 where it cannot measure."""
    for name, given, choices in (("--op", kernels, OPS), ("--dtype", kinds, KINDS)):
        wrong = [x for x in given or () if x not in choices]
        if wrong:
            print(f"tune: {name}: expected some of {', '.join(choices)}, got {', '.join(wrong)}")
            return 2
    if not torch.cuda.is_available():
        print(f"tune: needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees no GPU")
        return 2
    reason = machine_code.available()
    if reason:
        print(f"tune: {reason}")
        return 2
    architecture = launcher.architecture(torch.cuda.current_device())
    if write_table and architecture not in configs.ARCHITECTURES:
        print(f"tune: --write is for {configs.ARCHITECTURES}, this is {architecture}; use --out FILE")
        return 2
    if write_table and not (configs.TABLE.parents[2] / "pyproject.toml").exists():
        print(
            "tune: --write changes a checkout of the sources, and this package is installed elsewhere; use --out FILE"
        )
        return 2
    table = configs._table()
    todo = tasks(table, architecture, kernels or OPS, kinds or tuple(KINDS), dims or DIMS)
    if not todo:
        print("tune: the table has no such entries")
        return 2
    rates = matrix_rates()
    print(", ".join(f"{kind} matrix product {rate / 1e12:.0f} TFLOP/s" for kind, rate in rates.items()), flush=True)
    if log:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        log = Log(Path(log), **facts, matrix_product=rates)
    processes = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        chosen = run(table, architecture, todo, measure, rates, minutes, pool=pool, log=log)
    if not chosen:
        return 1
    for path in filter(None, (out and Path(out), configs.TABLE if write_table else None)):
        write(formatted(merged(table, architecture, chosen)), path)
        print(f"wrote {path}")
    if not (out or write_table):
        print(f"nothing was written: give --out FILE (to be named by {configs.ENVIRONMENT}), or --write in a checkout")
    return 0
