"""Times, memory and errors of the three operations on one GPU, beside what people use today; results as data.

    python benchmarks/gpu.py --out FOLDER [--quick] [--minutes N] [--skip NAME ...]

Writes ``FOLDER/{info_nce,byol,ema}.json`` after every row, the rows that matter most first, and a table at the end. A
rival that is not installed, runs out of memory or fails is listed under ``unavailable`` with the reason, and hides
nothing. The rates that fractions refer to are measured in the same run, on random data.

``--device cpu`` runs the same code on a CPU, to see that all of it works; its times mean nothing.
"""

import argparse
import functools
import gc
import itertools
import math
import sys
import time
import traceback
from pathlib import Path

import accuracy
import peers
import timing
import torch
import workloads as w

from selfsup_kernels import backends

PARTS = ("forward", "backward", "both")
OURS = "selfsup_kernels"
CUDA = "impl='cuda'"
"""Beside what impl="auto" takes, the kernels of the CUDA library by themselves."""

# (rows, dim, dtype, whether torch.compile is measured, which takes half a minute). Most important first.
INFO_NCE = (
    [(16384, 256, "bfloat16", True), (16384, 128, "bfloat16", False), (16384, 512, "bfloat16", False)],
    [(16384, 1024, "bfloat16", False), (65536, 256, "bfloat16", False), (16384, 256, "float32", True)],
    [(8192, d, "bfloat16", False) for d in (128, 256, 512, 1024)],
    [(65536, d, "bfloat16", False) for d in (128, 512, 1024)],
    [(16384, d, "float32", False) for d in (128, 512, 1024)],
    [(262144, 256, "bfloat16", False), (65536, 256, "float32", False), (262144, 128, "bfloat16", False)],
    [(1048576, 128, "bfloat16", False), (1048576, 256, "bfloat16", False)],
)
BYOL = [(262144, "float32", True), (262144, "bfloat16", False), (4096, "float32", False), (32768, "float32", False)]
BYOL += [(4096, "bfloat16", False), (32768, "bfloat16", False)]
EMA = [("ResNet-50", "float32", True), ("ResNet-50", "bfloat16", False)]
EMA += [("ViT-B", "float32", False), ("ViT-B", "bfloat16", False)]
TRUTH_OPERATIONS = 4e13
"""What the float64 reference of a whole loss may take; beyond it some rows are checked."""


class Suite:
    """One run: the clock, the rates of the device, the rows so far, and the time that is left."""

    def __init__(self, args):
        self.clock = timing.Clock(args.device, target_ms=20 if args.quick else 200)
        self.out, self.quick, self.skip = args.out, args.quick, set(args.skip)
        self.deadline = time.monotonic() + 60 * args.minutes
        self.rows = {"info_nce": [], "byol": [], "ema": []}
        size, copied = (8192, 2**30) if self.clock.cuda else (256, 2**22)
        self.rates = {
            "bfloat16": timing.matrix_product_tflops(self.clock, torch.bfloat16, size),
            "tfloat32": timing.matrix_product_tflops(self.clock, torch.float32, size, tf32=True),
            "float32": timing.matrix_product_tflops(self.clock, torch.float32, size),
        }
        self.copy = timing.copy_gb_per_s(self.clock, copied)
        self.header = {
            **self.clock.header(),
            "matrix_product_tflops": self.rates,
            "matrix_product_size": size,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "copy_gb_per_s": self.copy,
        }

    def spent(self):
        return time.monotonic() > self.deadline

    def add(self, name, rows):
        self.rows[name] += rows
        timing.write(self.out, name, self.header, self.rows[name])

    def attempt(self, function):
        """``(result, None)`` or ``(None, reason)``; afterwards the memory of what failed is free again."""
        if self.spent():
            return None, "skipped: out of time"
        try:
            return function(), None
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()
        return None, reason

    def measure(self, function, inputs):
        """The times of the parts of a loss. ``inputs`` is a list of arguments, taken in turn."""
        turn = itertools.cycle(inputs)

        def forward(arguments):
            with torch.no_grad():
                function(*arguments)

        def graph():
            arguments = next(turn)
            w.clear(arguments)
            return function(*arguments)

        def fresh():
            arguments = next(turn)
            w.clear(arguments)
            return arguments

        measure = self.clock.measure
        times = {
            "forward": measure(forward, lambda: next(turn)),
            "backward": measure(lambda loss: loss.backward(), graph),
            "both": measure(lambda arguments: function(*arguments).backward(), fresh),
        }
        for arguments in inputs:
            w.clear(arguments)
        return times

    def by_cuda(self, function):
        """``function`` with ``impl="cuda"``, as a rival."""
        reason = backends.unavailable("cuda") if self.clock.cuda else "needs a GPU"
        return (None, reason) if reason else (functools.partial(function, impl="cuda"), None)

    def rivals(self, rivals, inputs, wanted):
        """Everything about each of ``rivals`` (name -> (function, reason)): ``wanted`` maps a column to what fills it,
        a function of the rival's function and the inputs."""
        result = {column: {} for column in ("times", *wanted)}
        unavailable = {}
        for name, (function, reason) in rivals.items():
            if name in self.skip:
                function, reason = None, "skipped: by --skip"
            if function is None:
                unavailable[name] = reason
                continue
            times, reason = self.attempt(lambda function=function: self.measure(function, inputs))
            if reason:
                unavailable[name] = reason
                continue
            result["times"][name] = times
            for column, fill in wanted.items():
                value, reason = self.attempt(lambda fill=fill, name=name, function=function: fill(name, function))
                if reason:
                    unavailable[f"{name}, {column}"] = reason
                elif value is not None:
                    result[column][name] = value
        return result, unavailable

    def compiled(self, function):
        """``function`` through torch.compile, for one shape, as a rival."""
        if "compile" in self.skip:
            return None, "skipped: by --skip"
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False), None

    def graphed(self, function, inputs):
        """The median time of a replayed graph of forward and backward, in ms."""

        def step():
            torch.autograd.grad(function(*inputs), inputs[0])

        return self.clock.measure_graph(step)["p50_ms"]

    def by_part(self, facts, columns, unavailable):
        """One row for each part, in the format of benchmarks/compare.py."""
        for part in PARTS:
            times = {name: of_parts[part] for name, of_parts in columns["times"].items()}
            rest = {column: values for column, values in columns.items() if column != "times"}
            yield {**facts, "part": part, "times": times, **rest, "unavailable": unavailable}


def info_nce(suite, rows, dim, dtype, with_compile):
    clock, kind = suite.clock, getattr(torch, dtype)
    inputs = w.info_nce_inputs(rows // 2, dim, kind, clock.device)
    held, free = 3 * rows * rows * kind.itemsize, clock.free_bytes()
    reason = f"skipped: its M x M matrices take about {held / 1e9:.0f} GB" if held > free else None
    rivals = {OURS: (w.our_info_nce, None), CUDA: suite.by_cuda(w.our_info_nce)}
    rivals["eager"] = (None, reason) if reason else (w.eager_info_nce, None)
    if with_compile:
        rivals["compile"] = (None, reason) if reason else suite.compiled(w.eager_info_nce)
    rivals["chunked"] = (peers.chunked_info_nce, None)
    for name in peers.INFO_NCE:
        rivals[name] = peers.load(peers.INFO_NCE, name)
    if reason and "lightly" in rivals and rivals["lightly"][0]:
        rivals["lightly"] = (None, reason)
    if rows > 262144:
        rivals = {
            name: rival if name in (OURS, CUDA) else (None, "skipped: takes too long") for name, rival in rivals.items()
        }

    whole = 8 * rows * rows * dim <= TRUTH_OPERATIONS
    want, failure = suite.attempt(lambda: accuracy.info_nce_truth(inputs[0])) if whole else (None, None)

    def error(name, function):
        if want is not None:
            return accuracy.errors(function, inputs, want)
        return accuracy.info_nce_errors_of_rows(inputs[0]) if name == OURS else None

    wanted = {"peak_bytes": lambda name, function: clock.peak_bytes(lambda: w.both(function, inputs)), "errors": error}
    if clock.cuda and rows <= 16384:  # where launches may take as long as the work
        wanted["graph_ms"] = lambda name, function: (
            suite.graphed(function, inputs) if name in (OURS, CUDA, "eager") else None
        )
    columns, unavailable = suite.rivals(rivals, [inputs], wanted)
    if failure:
        unavailable["float64 reference"] = failure
    facts = {"views": 2, "batch": rows // 2, "dim": dim, "dtype": dtype, "notes": peers.NOTES}
    result = list(suite.by_part(facts, columns, unavailable))
    for row in result:
        if OURS in row["times"]:
            operations = w.info_nce_operations(rows, dim, row["part"], "triton" if clock.cuda else "cpu")
            row["tflops"] = operations / row["times"][OURS]["p50_ms"] / 1e9
            row["fraction"] = row["tflops"] / suite.rates["tfloat32" if dtype == "float32" else dtype]
            if dtype == "float32":
                row["fraction_of_float32"] = row["tflops"] / suite.rates["float32"]
    suite.add("info_nce", result)


def byol(suite, batch, dim, dtype, with_compile):
    clock, kind = suite.clock, getattr(torch, dtype)
    # Several inputs in turn, so that none is found in the cache.
    size = 2 * batch * dim * kind.itemsize
    count = max(1, min(32, math.ceil(4 * clock.cache_bytes() / size)))
    inputs = [w.byol_inputs(batch, dim, kind, clock.device, seed) for seed in range(count)]
    rivals = {OURS: (w.BYOL[OURS], None), CUDA: suite.by_cuda(w.BYOL[OURS]), "eager": (w.eager_byol, None)}
    if with_compile:
        rivals["compile"] = suite.compiled(w.eager_byol)
    want = accuracy.truth(w.eager_byol, inputs[0])
    wanted = {
        "peak_bytes": lambda name, function: clock.peak_bytes(lambda: w.both(function, inputs[0])),
        "errors": lambda name, function: accuracy.errors(function, inputs[0], want),
    }
    if clock.cuda:
        wanted["graph_ms"] = lambda name, function: suite.graphed(function, inputs[0])
    columns, unavailable = suite.rivals(rivals, inputs, wanted)
    result = list(suite.by_part({"batch": batch, "dim": dim, "dtype": dtype}, columns, unavailable))
    for row in result:
        if OURS in row["times"]:
            size = w.byol_bytes(batch, dim, row["part"], kind.itemsize)
            row["gb_per_s"] = size / row["times"][OURS]["p50_ms"] / 1e6
            row["fraction"] = row["gb_per_s"] / suite.copy
            graph = columns.get("graph_ms", {}).get(OURS)
            if graph and count == 1 and row["part"] == "both":  # smaller inputs stay in the cache from one replay on
                row["graph_fraction"] = size / graph / 1e6 / suite.copy
    suite.add("byol", result)


def ema(suite, model, dtype, with_compile):
    clock, kind = suite.clock, getattr(torch, dtype)
    shapes = w.EMA_MODELS[model]()
    if suite.quick and not clock.cuda:
        shapes = shapes[:12]
    targets, sources = w.ema_inputs(kind, shapes, clock.device)
    mixed = None if dtype == "float32" else "refuses mixed dtypes"
    calls = {
        OURS: (lambda: w.our_ema(targets, sources), None),
        "the op alone": (lambda: w.our_ema_op(targets, sources), None),
        CUDA: suite.by_cuda(lambda impl: w.our_ema(targets, sources, impl)),
        f"the op alone, {CUDA}": suite.by_cuda(lambda impl: w.our_ema_op(targets, sources, impl)),
        "foreach_lerp": (None if mixed else lambda: w.foreach_lerp(targets, sources), mixed),
        "loop of lerp_(x.float())": (lambda: w.loop_of_lerp(targets, sources), None),
        "timm": peers.load(peers.EMA, "timm", targets, sources),
    }
    if with_compile:
        of_foreach, reason = suite.compiled(w.foreach_lerp)
        calls["compile"] = (of_foreach and (lambda: of_foreach(targets, sources)), reason)
    times, graphs, unavailable = {}, {}, {}
    with torch.no_grad():
        for name, (call, reason) in calls.items():
            if call is None or name in suite.skip:
                unavailable[name] = reason or "skipped: by --skip"
                continue
            measured, reason = suite.attempt(lambda call=call: clock.measure(lambda _: call()))
            if reason:
                unavailable[name] = reason
                continue
            times[name] = measured
            if clock.cuda:
                graphs[name], reason = suite.attempt(lambda call=call: clock.measure_graph(call)["p50_ms"])
                unavailable |= {f"{name}, graph_ms": reason} if reason else {}
        error, reason = suite.attempt(lambda: accuracy.ema_error(w.our_ema, targets, sources))
        unavailable |= {f"{OURS}, errors": reason} if reason else {}
    numbers = sum(t.numel() for t in targets)
    row = {"model": model, "tensors": len(targets), "numbers": numbers, "target": "float32", "source": dtype}
    row |= {
        "times": times,
        "graph_ms": graphs,
        "errors": {} if error is None else {OURS: {"value": error}},
        "unavailable": unavailable,
    }
    if "the op alone" in times:
        row["gb_per_s"] = w.ema_bytes(numbers, kind) / times["the op alone"]["p50_ms"] / 1e6
        row["fraction"] = row["gb_per_s"] / suite.copy
    if graphs.get("the op alone"):  # without what the host takes to launch it
        row["graph_fraction"] = w.ema_bytes(numbers, kind) / graphs["the op alone"] / 1e6 / suite.copy
    suite.add("ema", [row])


def tasks(args):
    """(name, function, arguments): the most important first."""
    if args.quick and args.device == "cpu":
        yield from (("info_nce", info_nce, (64, 16, dtype, True)) for dtype in ("float32", "bfloat16"))
        yield "byol", byol, (48, 16, "float32", True)
        yield from (("ema", ema, (model, dtype, True)) for model, dtype, _ in EMA[:3])
        return
    groups = INFO_NCE[:2] if args.quick else INFO_NCE
    yield from (("info_nce", info_nce, shape) for group in groups[:2] for shape in group)
    yield from (("byol", byol, (batch, 256, *rest)) for batch, *rest in BYOL[: 3 if args.quick else None])
    yield from (("ema", ema, case) for case in EMA[: 2 if args.quick else None])
    yield from (("info_nce", info_nce, shape) for group in groups[2:] for shape in group)


def table(suite):
    """One line a row: what ours takes, what that is of the device, and how many times it the best rival takes."""
    print(f"\n{'':46} {'ms':>9} {'rate':>14} {'fraction':>9}   rivals, times ours")
    for name, rows in suite.rows.items():
        for row in rows:
            if "times" not in row:
                print(f"{name} {row['arguments']}: {row['failed']}")
                continue
            of = [row.get(k) for k in ("model", "batch", "dim", "dtype", "source", "part")]
            ours = row["times"].get("the op alone" if name == "ema" else OURS)
            label = f"{name} " + " ".join(str(x) for x in of if x is not None)
            if ours is None:
                print(f"{label:46} {row['unavailable'].get(OURS)}")
                continue
            rate = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
            others = {n: t["p50_ms"] / ours["p50_ms"] for n, t in row["times"].items() if n != OURS}
            beside = ", ".join(
                f"{n} {ratio:.2f}" for n, ratio in others.items() if not n.startswith("the op alone") or CUDA in n
            )
            print(f"{label:46} {ours['p50_ms']:9.3f} {rate:>14} {row['fraction']:9.2f}   {beside}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the most important rows alone; tiny ones on a CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no new measurement after this time")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="rivals to leave out, such as compile")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and this PyTorch sees none.", file=sys.stderr)
        return 2
    suite = Suite(args)
    print({k: v for k, v in suite.header.items() if not isinstance(v, dict)}, suite.rates, flush=True)
    for name, function, arguments in tasks(args):
        if suite.spent():
            suite.add(name, [{"arguments": arguments, "failed": "skipped: out of time"}])
            continue
        start = time.monotonic()
        try:
            function(suite, *arguments)
        except Exception as error:  # a row that fails is recorded, and the next one gets its turn
            traceback.print_exc()
            suite.add(name, [{"arguments": arguments, "failed": f"{type(error).__name__}: {error}"}])
        gc.collect()
        if suite.clock.cuda:
            torch.cuda.empty_cache()
        print(f"{name} {arguments}: {time.monotonic() - start:.1f} s", flush=True)
    table(suite)
    return 0


if __name__ == "__main__":
    sys.exit(main())
