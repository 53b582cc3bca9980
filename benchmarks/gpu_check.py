"""Everything that has to be seen on a GPU once, in one command of less than nine minutes: ``make gpu-check``.

    python benchmarks/gpu_check.py [--out DIR] [--minutes 8.7] [--only TEXT ...] [--skip TEXT ...]

Build, tests, benchmarks, compute-sanitizer and the predictions that the benchmarks are compared with, in the order of
what would be missed most. Each step has a limit of its own and is killed at it; one that fails does not hide the later
ones. What the steps print goes to ``DIR/gpu_check.log``; the last thing on the screen is a table of the steps, after
the end of what the benchmarks print.

``--skip build`` takes the libraries that are there: a CUDA library serves any Python, and can come from a machine
without a GPU. The steps that need none ("machine code", "predictions") come last.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout

GRACE = 5.0
"""Seconds between the interrupt that ends a step at its limit and the end of all its processes: pytest prints what had
failed until then."""

MINUTES = 8.7
"""Of all steps: time on a machine with a GPU is short, and starting it takes some."""

NO_TESTS = 5
"""pytest's exit status where no test was collected."""


class Step(NamedTuple):
    name: str
    command: list[str] | Callable[[float], list[str]]
    """Or a function that gives it from the seconds that the step may take."""
    limit: float
    """Seconds."""
    skip: str | None = None
    """Why the step is not run."""
    fine: tuple[int, ...] = (0,)
    """Exit statuses of success."""
    environment: dict[str, str] | None = None
    show: int = 0
    """Lines of the end of its output that are shown also where it succeeds."""
    reserve: float = 0
    """Seconds to leave for the later steps."""


class Outcome(NamedTuple):
    name: str
    state: str
    """ok, FAILED or skipped."""
    seconds: float
    note: str
    tail: list[str]


def run_step(step: Step, log, limit: float, environment: dict[str, str]) -> Outcome:
    """Run one step, append what it prints to the file ``log``, and kill it at ``limit`` seconds."""
    if step.skip:
        log.write(f"===== {step.name}: skipped, {step.skip}\n")
        return Outcome(step.name, "skipped", 0.0, step.skip, [])
    if limit < 1:
        log.write(f"===== {step.name}: no time was left\n")
        return Outcome(step.name, "FAILED", 0.0, "no time was left", [])
    command = step.command(limit) if callable(step.command) else step.command
    log.write(f"===== {step.name}: {' '.join(map(str, command))} (at most {limit:.0f} s)\n")
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment | (step.environment or {}),
                start_new_session=True,
                # A script's background commands ignore SIGINT, and what they start inherits that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        except OSError as error:
            return Outcome(step.name, "FAILED", 0.0, str(error), [])
        try:
            status, note = process.wait(limit), ""
        except subprocess.TimeoutExpired:
            status, note = None, f"killed after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):  # its children go too, where it has left any
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    log.write(text if text.endswith("\n") or not text else text + "\n")
    log.flush()
    good = status in step.fine
    if status is not None and not good:
        note = f"exit status {status}"
    lines = [line for line in text.splitlines() if line.strip()]
    if good and lines:
        note = lines[-1].strip()[:100]
    return Outcome(step.name, "ok" if good else "FAILED", seconds, note, lines[-(step.show or 40) :])


def run_steps(steps: list[Step], folder: Path, total: float, environment: dict[str, str] | None = None):
    """All steps, in ``total`` seconds together."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ if environment is None else environment)
    end = time.perf_counter() + total
    outcomes = []
    with open(folder / "gpu_check.log", "w") as log:
        for step in steps:
            left = end - time.perf_counter()
            outcome = run_step(step, log, min(step.limit, left - step.reserve), environment)
            outcomes.append(outcome)
            print(f"{outcome.state:8}{outcome.seconds:6.0f} s  {outcome.name}", flush=True)
    return outcomes


def report(outcomes: list[Outcome], steps: list[Step], folder: Path) -> int:
    """Print the ends of what failed and of what is to be shown, then the table. Returns the exit status."""
    shown = {step.name for step in steps if step.show}
    for outcome in outcomes:
        if outcome.state == "FAILED" or outcome.name in shown:
            print(f"\n----- {outcome.name}", *outcome.tail, sep="\n")
    facts = [o._asdict() | {"tail": None} for o in outcomes]
    (folder / "gpu_check.json").write_text(json.dumps(facts, indent=1) + "\n")
    width = max(len(o.name) for o in outcomes)
    print(f"\n{'step':{width}}  {'state':8}seconds  note")
    for o in outcomes:
        print(f"{o.name:{width}}  {o.state:8}{o.seconds:7.0f}  {o.note}")
    print(f"{sum(o.seconds for o in outcomes):.0f} s; everything printed is in {folder / 'gpu_check.log'}")
    return 1 if any(o.state == "FAILED" for o in outcomes) else 0


def workers(memory: int, processors: int | None) -> int:
    """How many processes share the tests: most of their time is compiling, so as many as there are processors; but
    each has a context and tensors of its own in the GPU's ``memory`` (bytes)."""
    return max(1, min(16, processors or 1, memory // (2 << 30)))


def all_steps(folder: Path, architecture: int, processes: int = 1, python: str = sys.executable) -> list[Step]:
    sanitizer = shutil.which("compute-sanitizer")
    benchmarks = ROOT / "benchmarks" / "gpu.py"
    # Briefly: a process that compiles all of its kernels takes minutes. The tests share that work, and have all dtypes.
    smoke = [python, "benchmarks/gpu_smoke.py", "--brief"]
    tests = [python, "-m", "pytest", "tests/gpu"]
    tests += [f"--ignore=tests/gpu/test_{name}.py" for name in ("static", "guard")]  # these need none
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(processes), "--dist", "worksteal"]

    def sanitized(tool, limit, *arguments, **environment):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50", *smoke, *arguments]
        missing = None if sanitizer else "compute-sanitizer is not on PATH"
        return Step(tool, command, limit, missing, environment=environment)

    def measure(limit):
        # The time after which it begins nothing new: what it is at then is finished, and the rates come first.
        return [python, str(benchmarks), "--out", str(folder), "--minutes", f"{max(0.5, (limit - 45) / 60):.1f}"]

    return [
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            180,
            # The CUDA library for this GPU alone: for all of them it takes minutes.
            environment={
                "SELFSUP_KERNELS_SKIP_BUILD": "0",
                "FORCE_CUDA": "1",
                "TORCH_CUDA_ARCH_LIST": f"{architecture // 10}.{architecture % 10}{'a' if architecture == 90 else ''}",
            },
            reserve=200,
        ),
        Step("every op once", smoke, 90, reserve=150),
        Step(
            "tests of the kernels",
            tests,
            210,
            # The processors are the processes' already.
            environment={
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            },
            reserve=100,
        ),
        Step("benchmarks", measure, 240, show=45),
        # Without PyTorch's cache of memory, so that the end of a tensor is the end of an allocation.
        sanitized("memcheck", 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        # With the cache memory that was freed counts as written: only fresh memory shows what is read before.
        sanitized("initcheck", 45, "--initcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitized("racecheck", 60),
        Step(
            "other tests marked cuda",
            [python, "-m", "pytest", "tests", "--ignore=tests/gpu", "-m", "cuda"],
            40,
            fine=(0, NO_TESTS),
        ),
        Step("machine code of CUDA C++", [python, "benchmarks/cuda_static.py"], 30),
        Step(
            "predictions",
            [
                python,
                "benchmarks/gpu_static.py",
                "--arch",
                str(architecture),
                "--brief",
                "--jobs",
                str(min(8, os.cpu_count() or 1)),
                "--json",
                str(folder / "static.json"),
            ],
            60,
        ),
    ]


def choose(steps: list[Step], only: list[str], skip: list[str]) -> list[Step]:
    """The steps with those marked as skipped that were not asked for, by any part of their names. Raises ValueError
    for a text that is in no name."""
    for text in (*only, *skip):
        if not any(text in step.name for step in steps):
            raise ValueError(f"no step has {text!r} in its name; there are: {', '.join(s.name for s in steps)}")

    def wanted(name):
        return (not only or any(text in name for text in only)) and not any(text in name for text in skip)

    return [step if wanted(step.name) else step._replace(skip="not asked for") for step in steps]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="steps whose name holds one of these")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="steps to leave out, likewise")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        choose(all_steps(Path(), 90), options.only, options.skip)
    except ValueError as error:
        parser.error(str(error))
    import torch

    from selfsup_kernels.lab.bench import results

    if not torch.cuda.is_available():
        print(f"gpu-check: needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees none")
        return 2
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    known = (80, 89, 90, 100, 120)
    architecture = max((a for a in known if a <= 10 * major + minor), default=known[0])
    folder = (options.out or ROOT / "benchmarks" / "results" / results.folder_name({"device": name})).resolve()
    print(f"{name}, compute capability {major}.{minor}, torch {torch.__version__}; results in {folder}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    # A failed build is a step that failed, not a reason for the tests of the Triton kernels not to run.
    environment["SELFSUP_KERNELS_SKIP_BUILD"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    memory = torch.cuda.get_device_properties(0).total_memory
    steps = all_steps(folder, architecture, workers(memory, os.cpu_count()))
    steps = choose(steps, options.only, options.skip)
    outcomes = run_steps(steps, folder, 60 * options.minutes - (time.perf_counter() - began), environment)
    return report(outcomes, steps, folder)


if __name__ == "__main__":
    sys.exit(main())
