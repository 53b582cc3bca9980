"""What reads the hardware's counters, as far as a machine without a GPU can tell: the profiler is a stand-in."""

import json
import os
import subprocess
import sys

import pytest
from helpers import benchmarks_script

counters = benchmarks_script("gpu_counters")

pytestmark = pytest.mark.unpoisoned

SUMS = "sums_kernel"
GRADIENT = "void selfsup::(anonymous namespace)::gradient_kernel<__nv_bfloat16, (int)256>(selfsup::Gradient)"
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def metrics(tensor, memory, ns=2_500_000):
    return {
        counters.FACTS["ns"]: (f"{ns:,}", "ns"),
        counters.FACTS["registers"]: ("168", "register/thread"),
        counters.UNITS["tensor"]: (str(tensor), "%"),
        counters.UNITS["memory"]: (str(memory), "%"),
        STALL.format("selected"): ("1.0", "inst"),
        STALL.format("long_scoreboard"): ("0.25", "inst"),
        STALL.format("math_pipe_throttle"): ("3.5", "inst"),
    }


LAUNCHES = [(SUMS, metrics(71.5, 3)), (SPIN, metrics(0, 0, 1)), (GRADIENT, metrics(20, 30)), (SPIN, metrics(0, 0, 1))]


def quoted(*cells):
    return ",".join(f'"{cell}"' for cell in cells)


def wide(launches):
    """The page "raw": a row for each kernel, below one of units."""
    names = list(metrics(0, 0))
    lines = [
        "==PROF== Connected to process 7 (/usr/bin/python3)",
        quoted("ID", "Process ID", "Kernel Name", "Block Size", *names),
        quoted("", "", "", "", *(unit for _, unit in metrics(0, 0).values())),
    ]
    lines += [quoted(i, 7, k, "(128, 1, 1)", *(v for v, _ in m.values())) for i, (k, m) in enumerate(launches)]
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


def long(launches):
    """The other pages: a row for each metric of each kernel."""
    lines = [quoted("ID", "Process ID", "Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value")]
    for i, (kernel, values) in enumerate(launches):
        lines += [quoted(i, 7, kernel, "Command line profiler metrics", k, u, v) for k, (v, u) in values.items()]
    return "\n".join(lines)


@pytest.mark.parametrize("page", [wide, long])
def test_both_tables_of_the_profiler_are_read(page):
    kernels = counters.parse(page(LAUNCHES))
    assert [name for name, _ in kernels] == [name for name, _ in LAUNCHES]
    for (_, got), (_, wanted) in zip(kernels, LAUNCHES, strict=True):
        for name, (value, _) in wanted.items():
            assert got[name] == float(value.replace(",", ""))


def test_more_than_ten_kernels_stay_in_order():
    launches = [(f"kernel_{i}", metrics(i, 0)) for i in range(12)]
    assert [name for name, _ in counters.parse(wide(launches))] == [name for name, _ in launches]


def test_a_row_says_what_bounds_the_kernel():
    busy, waiting = (counters.describe(*kernel) for kernel in counters.parse(wide(LAUNCHES))[::2])
    assert busy["kernel"] == "sums_kernel"
    assert busy["ns"] == 2_500_000
    assert busy["registers"] == 168
    assert busy["occupancy_percent"] is None  # not among what was read
    assert busy["units"] == {"tensor": 71.5, "memory": 3}
    assert busy["bound"] == "tensor 72 %"
    assert waiting["kernel"] == "gradient_kernel"
    assert list(waiting["stalls"]) == ["math_pipe_throttle", "long_scoreboard"]
    assert waiting["bound"] == "latency: memory 30 % at most, waits on math_pipe_throttle"
    assert "no counters" in counters.describe("other", {})["bound"]


def test_kernels_are_divided_by_the_marks():
    divided = counters.divide(counters.parse(wide(LAUNCHES)), ["first", "second"])
    assert {name: [row["kernel"] for row in rows] for name, rows in divided.items()} == {
        "first": ["sums_kernel"],
        "second": ["gradient_kernel"],
    }
    for broken in (LAUNCHES[:-1], LAUNCHES[1:3], []):
        with pytest.raises(ValueError, match="were to be made"):
            counters.divide(counters.parse(wide(broken)), ["first", "second"])


def test_values_that_are_none_are_left_out():
    launches = [(SUMS, metrics(71.5, "n/a"))]
    ((_, got),) = counters.parse(wide(launches))
    assert counters.UNITS["memory"] not in got
    assert counters.describe(SUMS, got)["units"] == {"tensor": 71.5}


# ---------------------------------------------------------------- the command, with a stand-in for the profiler

PROFILER = """#!{python}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
log = pathlib.Path(arguments[arguments.index("--log-file") + 1])
begin = arguments.index({python!r})
assert arguments[arguments.index("--clock-control") + 1] == "none"
assert arguments[arguments.index("--profile-from-start") + 1] == "off"
run = subprocess.run([*arguments[begin:], "--quick"], capture_output=True, text=True)
print(run.stdout, run.stderr)
log.write_text({text!r})
sys.exit({status})
"""


@pytest.fixture
def profiler(tmp_path, monkeypatch):
    """Makes a stand-in for ``ncu`` that runs the calls, small and on the CPU, and then prints ``text``."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(text, status=0):
        path = tmp_path / "ncu"
        path.write_text(PROFILER.format(python=sys.executable, text=text, status=status))
        path.chmod(0o755)
        return str(path)

    return make


ONLY = ["triton: ema"]


def test_a_whole_run(profiler, tmp_path, capfd):
    kernels = [("ema_kernel", metrics(0, 91)), (SPIN, metrics(0, 0))]
    assert counters.measure(profiler(wide(kernels)), ONLY, tmp_path) == 0
    printed = capfd.readouterr().out
    assert "FAILED" not in printed
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("ema_kernel")]
    assert line.split()[1] == "2.5"
    assert line.endswith("memory 91 %")
    assert f"knows no {counters.UNITS['xu']}" in printed
    data = json.loads((tmp_path / "counters.json").read_text())
    assert [row["kernel"] for rows in data.values() for row in rows] == ["ema_kernel"]


def test_a_call_without_kernels_is_a_failure(profiler, tmp_path, capfd):
    """As one that failed: the others are still shown."""
    kernels = [("ema_kernel", metrics(0, 91)), (SPIN, metrics(0, 0)), (SPIN, metrics(0, 0))]
    assert counters.measure(profiler(wide(kernels)), ["ema"], tmp_path) == 1
    printed = capfd.readouterr().out
    assert "FAILED cuda: ema" in printed
    assert "memory 91 %" in printed


def test_marks_that_do_not_fit_are_a_failure_and_hide_nothing(profiler, tmp_path, capfd):
    assert counters.measure(profiler(wide([("ema_kernel", metrics(0, 91))])), ONLY, tmp_path) == 1
    printed = capfd.readouterr().out
    assert "0 calls between the marks" in printed
    assert "memory 91 %" in printed


@pytest.mark.parametrize("text", ["==ERROR== The user has no permission to access the counters\n", ""])
def test_a_profiler_that_reads_nothing_is_a_failure(profiler, tmp_path, capfd, text):
    assert counters.measure(profiler(text, status=1), ONLY, tmp_path) == 1
    printed = capfd.readouterr().out
    assert text.strip() in printed
    assert "no counters were read" in printed


def test_without_a_profiler_or_a_gpu_it_says_so(monkeypatch, tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, counters.__file__], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "")
    assert "ncu is not on PATH" in run.stdout
    (tmp_path / "ncu").write_text("#!/bin/sh\n")
    (tmp_path / "ncu").chmod(0o755)
    run = subprocess.run([sys.executable, counters.__file__], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "")
    assert "needs an NVIDIA GPU" in run.stdout


def test_every_kind_of_kernel_is_called():
    names = [name for name, *_ in counters.calls(quick=False)]
    assert len(set(names)) == len(names)
    for impl in ("triton", "cuda"):
        for op in ("info_nce", "byol", "ema"):
            assert any(name.startswith(f"{impl}: {op}") for name in names)
    assert [name for name, *_ in counters.chosen(["cuda: ema"], quick=False)] == [
        name for name in names if name.startswith("cuda: ema")
    ]
