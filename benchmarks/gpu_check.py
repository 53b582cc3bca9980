"""Check everything that has to be seen on a GPU once, in less than nine minutes: ``make gpu-check``.

    python benchmarks/gpu_check.py [--out DIR] [--minutes 8.7] [--only TEXT ...] [--skip TEXT ...]

Build, tests, benchmarks, compute-sanitizer and machine code, the most important first. Each step has a limit of its
own and is killed at it; one that fails does not hide the later ones. A table of the steps is printed last.

``--skip build`` takes the libraries that are there: a CUDA library serves any Python, and can come from a machine
without a GPU. ``--smoke`` calls every op twice, forward and backward, and no more: compute-sanitizer runs that. The
second call of InfoNCE replays the launches of the first. The shapes are the smallest that reach every kernel and every
edge of it, and the results only have to be finite.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import torch

import selfsup_kernels as sk
from selfsup_kernels.lab import sass
from selfsup_kernels.lab.bench import results

ROOT = Path(__file__).resolve().parent.parent

GRACE = 5.0
"""Seconds between the interrupt that ends a step at its limit and the end of all its processes: pytest prints what had
failed until then."""


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: float
    """Seconds."""
    skip: str | None = None
    """Why the step is not run."""
    fine: tuple[int, ...] = (0,)
    """Exit statuses of success."""
    environment: dict[str, str] = {}  # noqa: RUF012


def run_step(step: Step, limit: float) -> str:
    """Run one step, kill it and its children at ``limit`` seconds, and return what became of it."""
    if step.skip:
        return f"skipped: {step.skip}"
    if limit < 1:
        return "FAILED: no time was left"
    print(f"\n===== {step.name}: {' '.join(map(str, step.command))} (at most {limit:.0f} s)", flush=True)
    # A script's background commands ignore SIGINT, and what they start would too.
    killer = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{limit}", "env", "--default-signal=INT"]
    environment = os.environ | step.environment
    status = subprocess.run([*killer, *step.command], stdin=subprocess.DEVNULL, cwd=ROOT, env=environment).returncode
    if status in step.fine:
        return "ok"
    return f"FAILED: killed after {limit:.0f} s" if status in (124, 137, -9) else f"FAILED: exit status {status}"


def run_steps(steps: list[Step], total: float) -> int:
    """Run all steps, in ``total`` seconds together, and print a table of them; return the exit status."""
    end, lines = time.perf_counter() + total, []
    for step in steps:
        began = time.perf_counter()
        state = run_step(step, min(step.limit, end - began))
        lines.append([step.name, f"{time.perf_counter() - began:.0f}", state])
    print()
    sass.print_table(("step", "seconds", "state"), lines)
    return 1 if any(state.startswith("FAILED") for _, _, state in lines) else 0


def all_steps(folder: Path, architecture: int, processes: int = 1) -> list[Step]:
    python, sanitizer = sys.executable, shutil.which("compute-sanitizer")
    cores = os.cpu_count() or 1
    smoke = [python, "benchmarks/gpu_check.py", "--smoke"]
    tests = [python, "-m", "pytest", "tests/gpu"]
    tests += [f"--ignore=tests/gpu/test_{name}.py" for name in ("static", "guard")]  # these need none
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(processes), "--dist", "worksteal"]
    static = [python, "benchmarks/gpu_static.py", "--arch", str(architecture), "--brief", "--jobs", str(min(8, cores))]
    compiling = {
        "SELFSUP_KERNELS_SKIP_BUILD": "0",
        "FORCE_CUDA": "1",
        # The CUDA library for this GPU alone: for all of them it takes minutes.
        "TORCH_CUDA_ARCH_LIST": f"{architecture // 10}.{architecture % 10}{'a' if architecture == 90 else ''}",
    }
    # The cores are the processes' already.
    sharing = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # Without PyTorch's cache of memory the end of a tensor is the end of an allocation (memcheck), and memory that was
    # freed does not count as written (initcheck).
    fresh = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitized(tool, limit, *arguments, environment=fresh):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50", *smoke, *arguments]
        missing = None if sanitizer else "compute-sanitizer is not on PATH"
        return Step(tool, command, limit, missing, environment=environment)

    # It begins nothing new in the last 45 s of its limit.
    host = [python, "benchmarks/host.py", "--rounds", "50"]
    measure = [python, "benchmarks/gpu.py", "--out", str(folder), "--minutes", "3.2"]
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 180, environment=compiling),
        Step("every op", smoke, 90),
        Step("tests of the kernels", tests, 210, environment=sharing),
        Step("benchmarks", measure, 240),
        Step("the host's time", [*host, "--device", "cuda", "--json", str(folder / "host.json")], 30),
        sanitized("memcheck", 60),
        sanitized("initcheck", 45, "initcheck"),
        sanitized("racecheck", 60, environment={}),
        # pytest's status is 5 where it has collected no test.
        Step("other tests", [python, "-m", "pytest", "tests", "--ignore=tests/gpu", "-m", "cuda"], 40, fine=(0, 5)),
        Step("machine code of CUDA C++", [python, "benchmarks/cuda_static.py"], 30),
        Step("machine code of Triton", [*static, "--json", str(folder / "static.json")], 60),
    ]


def choose(steps: list[Step], only: list[str], skip: list[str]) -> list[Step]:
    """Mark the steps that were not asked for, by any part of their names; raise ValueError for a text in no name."""
    names = [step.name for step in steps]
    for text in (*only, *skip):
        if not any(text in name for name in names):
            raise ValueError(f"no step has {text!r} in its name; there are: {', '.join(names)}")

    def wanted(name):
        return (not only or any(text in name for text in only)) and not any(text in name for text in skip)

    return [step if wanted(step.name) else step._replace(skip="not asked for") for step in steps]


# ---------------------------------------------------------------- every op


def info_nce(batch, dim, device, deterministic=False, labels=False, queue=False, learned=False, **arguments):
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return torch.randn(n, dim, generator=generator).to(device, torch.bfloat16)

    views = [rows(batch).requires_grad_() for _ in range(2)]
    temperature = torch.tensor(0.2, device=device, requires_grad=True) if learned else 0.2
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    loss = sk.info_nce_loss(
        views,
        temperature=temperature,
        labels=torch.randint(5, (batch,), generator=generator).to(device) if labels else None,
        queue=rows(70) if queue else None,
        impl="triton",
        **arguments,
    )
    loss.float().sum().backward()
    torch.use_deterministic_algorithms(False)
    return [loss, *(v.grad for v in views), *([temperature.grad] if learned else [])]


def byol(views, dim, reduction, device):
    p, t = (torch.randn(views, 37, dim).to(device, torch.bfloat16) for _ in range(2))
    loss = sk.byol_loss(p.requires_grad_(), t, reduction=reduction, impl="cuda")
    loss.sum().backward()
    return [loss, p.grad]


def ema(rounding, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    targets = [torch.randn(s).to(device, d) for s in ((3,), (4097,), (64, 65), (1,)) for d in dtypes]
    sources = [torch.randn_like(t, dtype=torch.float32) for t in targets]
    sk.ema_update_(targets, sources, 0.9, stochastic_rounding=rounding, impl="cuda")
    return targets


KINDS = {
    "plain": {},
    "labels, queue": {"labels": True, "queue": True, "reduction": "none", "objective": "per_positive"},
    "deterministic, learned": {"deterministic": True, "queue": True, "learned": True},
}


def calls(initcheck=False):
    """Yield (name, function of the device) of every call: rows that fill no tile, and widths that are no power of two.

    For initcheck without the two places where kernels read unwritten memory on purpose. The sum of the BYOL losses
    finds a count of arrivals there (``csrc/cuda/byol.cu``), so the losses are asked for one by one. The last rows of a
    wave of InfoNCE, where they do not fill a tile of the product, are multiplied with what was there, and not stored,
    so long rows come in numbers that fill it.
    """
    for (batch, dim), (name, arguments) in product(
        ((131, 40), (300, 128), (256 if initcheck else 131, 300)), KINDS.items()
    ):
        yield f"info_nce {batch}x{dim} {name}", partial(info_nce, batch, dim, **arguments)
    for views, dim in ((2, 100), (3, 2048)):
        yield f"byol {views} views, D={dim}", partial(byol, views, dim, "none" if initcheck else "mean")
    for rounding in (False, True):
        yield f"ema rounding={rounding}", partial(ema, rounding)


def smoke(initcheck, device="cuda") -> int:
    failed = 0
    for name, call in calls(initcheck):
        try:
            for _ in range(2):
                if not all(bool(x.isfinite().all()) for x in call(device=torch.device(device))):
                    raise ArithmeticError("a result is not finite")
        except Exception as error:  # the other calls run all the same
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{failed} of the calls failed" if failed else "every op ran, and its results are finite")
    return 1 if failed else 0


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument("--minutes", type=float, default=8.7, help="of all steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="steps whose name holds one of these")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="steps to leave out, likewise")
    parser.add_argument("--smoke", nargs="?", const="all", choices=("all", "initcheck"), help="call every op twice")
    options = parser.parse_args(arguments)
    if options.smoke:
        return smoke(options.smoke == "initcheck")
    began = time.perf_counter()
    try:
        choose(all_steps(Path(), 90), options.only, options.skip)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print(f"gpu-check: needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees none")
        return 2
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    architecture = max((a for a in (80, 86, 90, 100, 120) if a <= 10 * major + minor), default=80)
    folder = (options.out or ROOT / "benchmarks" / "results" / results.folder_name({"device": name})).resolve()
    print(f"{name}, compute capability {major}.{minor}, torch {torch.__version__}; results in {folder}", flush=True)
    os.environ.pop("TRITON_INTERPRET", None)
    # A failed build is a step that failed, not a reason for the tests of the Triton kernels not to run.
    os.environ |= {"PYTHONUNBUFFERED": "1", "SELFSUP_KERNELS_SKIP_BUILD": "1", "SELFSUP_KERNELS_EVERY_CASE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Most of the tests' time is compiling; each process has a context and tensors of its own on the GPU.
    processes = min(16, os.cpu_count() or 1, 1 + torch.cuda.get_device_properties(0).total_memory // (2 << 30))
    steps = choose(all_steps(folder, architecture, processes), options.only, options.skip)
    return run_steps(steps, 60 * options.minutes - (time.perf_counter() - began))


if __name__ == "__main__":
    sys.exit(main())
