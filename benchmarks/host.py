"""Measure the host's time per call of the losses and the EMA, on tensors so small that nothing else counts.

    python benchmarks/host.py [--device cuda|stub] [--rounds N] [--calls N] [--only TEXT] [--json FILE]

Each call has a baseline with the same tensors: an autograd Function that computes nothing, or the one operator of
PyTorch that does the same work. The calls take turns, so that a disturbance of the machine affects all alike; a ratio
is that of the medians. On a GPU the host does not wait inside a call, and the GPU's own time is measured apart.
The stub is the CUDA driver of the tests, which launches nothing: with it InfoNCE on CPU tensors takes the way of the
GPU. There and on a GPU the first call of a process is measured as well, with the machine code of `make kernels`.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import tables
import torch

import selfsup_kernels as sk
from selfsup_kernels.lab.bench import results, timing
from selfsup_kernels.tiles import archive

VIEWS, BATCH, DIM = 2, 4, 8
PARAMETERS, NORMALISATIONS = 161, 53
"""Those of ResNet-50; a normalisation has three buffers."""


class Empty(torch.autograd.Function):
    """Save the inputs and compute nothing: what any autograd Function costs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class Case(NamedTuple):
    """A call, what it is compared with (None: it is a baseline itself), and the largest ratio that is wanted."""

    name: str
    call: Callable
    baseline: str | None = None
    goal: float | None = None


def step(loss, inputs):
    loss(*inputs).backward()
    for x in inputs:
        x.grad = None


def model(randn):
    """Return a module with the number of parameters and buffers of ResNet-50, one element each."""
    module = torch.nn.Module()
    for i in range(PARAMETERS):
        module.register_parameter(f"parameter{i}", torch.nn.Parameter(randn(1)))
    for i in range(NORMALISATIONS):
        module.register_buffer(f"running_mean{i}", randn(1))
        module.register_buffer(f"running_var{i}", randn(1))
        module.register_buffer(f"num_batches_tracked{i}", randn(1).long())
    return module


def cases(device):
    """Return all calls; a baseline comes before what is compared with it."""
    randn = functools.partial(torch.randn, device=device)
    pair = [randn(BATCH, DIM).requires_grad_() for _ in range(VIEWS)]
    stacked = [randn(VIEWS, BATCH, DIM).requires_grad_()]
    predictions, targets = [randn(BATCH, DIM).requires_grad_()], randn(BATCH, DIM)
    lists = [[randn(1) for _ in range(PARAMETERS)] for _ in range(2)]
    ema = sk.EMA(model(randn))
    found = []
    for shown, inputs in (("list of two views", pair), ("stacked views", stacked)):
        baseline = f"empty autograd.Function, {shown}"
        found.append(Case(baseline, functools.partial(step, Empty.apply, inputs)))
        for impl, goal in (("auto", 2.0), ("reference", None)):
            loss = lambda *x, impl=impl: sk.info_nce_loss(x if len(x) > 1 else x[0], impl=impl)  # noqa: E731
            found.append(Case(f"info_nce_loss, {impl}, {shown}", functools.partial(step, loss, inputs), baseline, goal))
    empty, lerp = "empty autograd.Function, one pair", f"_foreach_lerp_, {PARAMETERS} tensors"
    return [
        *found,
        Case(empty, functools.partial(step, Empty.apply, predictions)),
        Case(
            "byol_loss, one pair", functools.partial(step, lambda p: sk.byol_loss(p, targets), predictions), empty, 1.6
        ),
        Case(lerp, lambda: torch._foreach_lerp_(*lists, 0.01)),
        Case(f"ema_update_, {PARAMETERS} tensors", lambda: sk.ema_update_(*lists, 0.99), lerp, 1.2),
        Case(f"EMA.update, and {3 * NORMALISATIONS} buffers", ema.update, lerp, 1.5),
    ]


def stub_cases():
    """Return InfoNCE's calls as on a GPU, and how many kernels each launches."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/gpu/stub_driver"))
    import stub_driver

    stub = stub_driver.install(Path(tempfile.mkdtemp()))
    found, launches = [], []
    for shown, dim in (("", 128), (", long rows", 600)):
        inputs = [torch.randn(256, dim, dtype=torch.bfloat16).requires_grad_() for _ in range(VIEWS)]
        call = functools.partial(step, lambda *x: sk.info_nce_loss(x, impl="triton"), inputs)
        call()  # through Python, and recorded
        launches.append(len(stub.launches) - sum(launches))
        baseline = f"empty autograd.Function{shown}"
        found.append(Case(baseline, functools.partial(step, Empty.apply, inputs)))
        found.append(Case(f"info_nce_loss, {launches[-1]} launches{shown}", call, baseline, 2.0))
    stub.watch(False)
    return found, launches


FIRST_CALL = """
import json, time, torch, selfsup_kernels as sk
views = torch.randn(2, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
(2 * views.float()).sum().backward()
torch.cuda.synchronize()
start = time.perf_counter()
sk.info_nce_loss(views, impl="triton").backward()
torch.cuda.synchronize()
print(json.dumps({"first ms": 1e3 * (time.perf_counter() - start)}))
"""


def first_call(on_stub):
    """Return the median time in ms of the first call, forward and backward, of five processes."""
    if on_stub:
        import stub_driver

        script = Path(stub_driver.__file__).with_name("without_triton.py")
        command = [sys.executable, script, Path(stub_driver.stub.library._name).parent]
    else:
        command = [sys.executable, "-c", FIRST_CALL]
    root = Path(__file__).resolve().parents[1]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=root)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    return statistics.median(json.loads(run(command, env=environment).stdout)["first ms"] for _ in range(5))


def measure(found, device, rounds, calls):
    """Return a row for each case: the host's times per call in us and, on a GPU, the GPU's."""
    times = {case.name: [] for case in found}
    for number in range(rounds + 1):
        for case in found:
            start = time.perf_counter()
            for _ in range(calls):
                case.call()
            seconds = time.perf_counter() - start
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first round loads code
                times[case.name].append(1e6 * seconds / calls)
    return [row(case, times, gpu_time(case.call, calls) if device.type == "cuda" else None) for case in found]


def row(case, times, gpu_us=None):
    """Return the figures of one case, from the times of all."""
    median = statistics.median(times[case.name])
    return {
        "name": case.name,
        "median_us": median,
        "minimum_us": min(times[case.name]),
        "baseline": case.baseline,
        "ratio": median / statistics.median(times[case.baseline]) if case.baseline else None,
        "goal": case.goal,
        "gpu_us": gpu_us,
    }


def gpu_time(call, calls):
    """Return the GPU's time per call in us: it is kept busy until the host has queued all calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000_000)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / calls


def table(rows):
    """Return the rows as the lines of a table; the last column only where a GPU was measured."""
    head = ["call", "median us", "minimum us", "of its baseline", "goal", "GPU us"]
    keys = ("median_us", "minimum_us", "ratio", "goal", "gpu_us")
    formats = ("{:.1f}", "{:.1f}", "{:.2f}", "{:.1f}", "{:.1f}")
    lines = [
        [r["name"], *("" if r[key] is None else form.format(r[key]) for key, form in zip(keys, formats, strict=True))]
        for r in rows
    ]
    columns = len(head) - all(r["gpu_us"] is None for r in rows)
    return tables.table(head[:columns], [line[:columns] for line in lines])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu, cuda, stub (default: cpu)")
    parser.add_argument("--rounds", type=int, default=200, help="how often all calls take turns (default: 200)")
    parser.add_argument("--calls", type=int, default=20, help="how many calls one turn has (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="how many threads PyTorch may use (default: 1)")
    parser.add_argument("--only", default="", help="measure only what contains this text, and the baselines")
    parser.add_argument("--json", type=Path, help="write what was measured, and on what, to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    on_stub = args.device == "stub"
    device = torch.device("cpu" if on_stub else args.device)
    found, launches = stub_cases() if on_stub else (cases(device), None)
    found = [case for case in found if case.baseline is None or args.only in case.name]
    rows = measure(found, device, args.rounds, args.calls)
    print(*table(rows), sep="\n")
    if launches:
        few, many = (row["minimum_us"] for row in rows if row["baseline"])
        print(f"\nA launch more takes {(many - few) / (launches[1] - launches[0]):.2f} us (of the minima; goal: 4).")
    if device.type == "cuda" or on_stub:
        ahead = archive.opened()
        if ahead is None:
            print("The first call of a process was not measured: `make kernels` compiles its kernels ahead of time.")
        else:
            milliseconds = first_call(on_stub)
            print(f"The first call of a process takes {milliseconds:.0f} ms (goal: 50).")
            rows.append(
                row(Case("first call of a process", None, goal=50e3), {"first call of a process": [1e3 * milliseconds]})
            )
    if args.json:
        results.write_json(args.json, results.header(timing.Clock(device)), rows)
    return rows


if __name__ == "__main__":
    main()
