"""What reads the hardware's counters, as far as a machine without a GPU can tell: the profiler is a stand-in."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import benchmarks_script

counters = benchmarks_script("gpu_counters")

pytestmark = pytest.mark.unpoisoned

SUMS = "sums_kernel"
EMA = "void selfsup::(anonymous namespace)::ema_kernel<__nv_bfloat16, (int)256>(selfsup::Gradient)"
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


LAUNCHES = [(SUMS, metrics(71.5, 3)), (EMA, metrics(20, 30))]


def printed_by_ncu(launches):
    """A row for each kernel, below one of units."""

    def quoted(*cells):
        return ",".join(f'"{cell}"' for cell in cells)

    names = list(metrics(0, 0))
    lines = [
        "==PROF== Connected to process 7 (/usr/bin/python3)",
        quoted("ID", "Process ID", "Kernel Name", "Block Size", *names),
        quoted("", "", "", "", *(unit for _, unit in metrics(0, 0).values())),
    ]
    lines += [quoted(i, 7, k, "(128, 1, 1)", *(v for v, _ in m.values())) for i, (k, m) in enumerate(launches)]
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


def test_the_table_of_the_profiler_is_read():
    launches = [*LAUNCHES, *((f"kernel_{i}", metrics(i, "n/a")) for i in range(12))]
    kernels = counters.parse(printed_by_ncu(launches))
    assert [name for name, _ in kernels] == [name for name, _ in launches]
    for (_, got), (_, wanted) in zip(kernels, launches, strict=True):
        read = {name: float(v.replace(",", "")) for name, (v, _) in wanted.items() if v != "n/a"}
        assert {name: value for name, value in got.items() if name in wanted} == read


def test_a_row_says_what_bounds_the_kernel():
    busy, waiting = (counters.describe(*kernel) for kernel in counters.parse(printed_by_ncu(LAUNCHES)))
    assert (busy["kernel"], waiting["kernel"]) == ("sums_kernel", "ema_kernel")
    assert (busy["ns"], busy["registers"]) == (2_500_000, 168)
    assert busy["occupancy_percent"] is None  # not among what was read
    assert busy["units"] == {"tensor": 71.5, "memory": 3}
    assert busy["bound"] == "tensor 72 %"
    assert list(waiting["stalls"]) == ["math_pipe_throttle", "long_scoreboard"]
    assert waiting["bound"] == "latency: memory 30 % at most, waits on math_pipe_throttle"
    assert "no counters" in counters.describe("other", {})["bound"]


PROFILER = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
assert arguments[arguments.index("--clock-control") + 1] == "none"
assert arguments[arguments.index("--profile-from-start") + 1] == "off"
assert arguments[-2:] == ["--call", "cuda: a call"]
pathlib.Path(arguments[arguments.index("--log-file") + 1]).write_text({text!r})
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("text", "status", "shown"),
    [
        (printed_by_ncu([(SUMS, metrics(91, 0))]), 0, "tensor 91 %"),
        (printed_by_ncu([]), 0, "no counters were read"),
        ("==ERROR== no permission to access the counters\n", 1, "no permission"),
        ("", 1, "no counters were read (ncu's exit status is 1)"),
    ],
)
def test_a_whole_run(tmp_path, capfd, text, status, shown):
    """With a stand-in for ``ncu`` that only prints."""
    ncu = tmp_path / "ncu"
    ncu.write_text(PROFILER.format(python=sys.executable, text=text, status=status))
    ncu.chmod(0o755)
    assert counters.measure(str(ncu), ["cuda: a call"], tmp_path) == (0 if "%" in shown else 1)
    assert shown in capfd.readouterr().out
    assert list(json.loads((tmp_path / "counters.json").read_text())) == ["cuda: a call"]


def test_without_a_profiler_or_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for reason in ("ncu is not on PATH", "needs an NVIDIA GPU"):
        run = subprocess.run([sys.executable, counters.__file__], env=environment, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (2, "")
        assert reason in run.stdout
        (tmp_path / "ncu").write_text("#!/bin/sh\n")
        (tmp_path / "ncu").chmod(0o755)


def test_calls(monkeypatch):
    """Each kind of kernel, and as small ones on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {name.split()[1] for name in counters.calls()} == {"info_nce", "byol", "ema"}
    for workload, _ in counters.calls(quick=True).values():
        counters.make_call(workload, "auto")
