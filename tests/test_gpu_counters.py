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
EMA = "void selfsup::(anonymous namespace)::ema_kernel<__nv_bfloat16, (int)256>(selfsup::Gradient)"
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


LAUNCHES = [(SUMS, metrics(71.5, 3)), (SPIN, metrics(0, 0, 1)), (EMA, metrics(20, 30)), (SPIN, metrics(0, 0, 1))]


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
    busy, waiting = (counters.describe(*kernel) for kernel in counters.parse(printed_by_ncu(LAUNCHES))[::2])
    assert (busy["kernel"], waiting["kernel"]) == ("sums_kernel", "ema_kernel")
    assert (busy["ns"], busy["registers"]) == (2_500_000, 168)
    assert busy["occupancy_percent"] is None  # not among what was read
    assert busy["units"] == {"tensor": 71.5, "memory": 3}
    assert busy["bound"] == "tensor 72 %"
    assert list(waiting["stalls"]) == ["math_pipe_throttle", "long_scoreboard"]
    assert waiting["bound"] == "latency: memory 30 % at most, waits on math_pipe_throttle"
    assert "no counters" in counters.describe("other", {})["bound"]


def test_kernels_are_divided_by_the_marks():
    divided = counters.divide(counters.parse(printed_by_ncu(LAUNCHES)), ["first", "second"])
    assert [[row["kernel"] for row in rows] for rows in divided.values()] == [["sums_kernel"], ["ema_kernel"]]
    for broken in (LAUNCHES[:-1], LAUNCHES[1:3], []):
        with pytest.raises(ValueError, match="were to be made"):
            counters.divide(counters.parse(printed_by_ncu(broken)), ["first", "second"])


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
BUSY = (SUMS, metrics(91, 0))
MARK = (SPIN, metrics(0, 0))


@pytest.mark.parametrize(
    ("text", "status", "expected", "shown"),
    [
        (printed_by_ncu([BUSY, MARK]), 0, 0, ["tensor 91 %", f"knows no {counters.UNITS['xu']}"]),
        (printed_by_ncu([MARK]), 0, 1, []),  # a call without kernels is one that failed
        (printed_by_ncu([BUSY]), 0, 1, ["0 calls between the marks", "tensor 91 %"]),
        ("==ERROR== no permission to access the counters\n", 1, 1, ["no permission", "no counters were read"]),
        ("", 1, 1, ["no counters were read"]),
    ],
)
def test_a_whole_run(tmp_path, monkeypatch, capfd, text, status, expected, shown):
    """With a stand-in for ``ncu`` that makes the calls, small and on the CPU, and then prints ``text``."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(counters, "chosen", lambda only, quick: counters.calls(quick)[4:5])
    ncu = tmp_path / "ncu"
    ncu.write_text(PROFILER.format(python=sys.executable, text=text, status=status))
    ncu.chmod(0o755)
    assert counters.measure(str(ncu), ["V2 B2 D128"], tmp_path) == expected
    printed = capfd.readouterr().out
    assert "FAILED" not in printed
    assert all(words in printed for words in shown)
    if not expected:
        ((row,),) = json.loads((tmp_path / "counters.json").read_text()).values()
        assert row["kernel"] == SUMS


def test_a_call_that_fails_is_named(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("selfsup_kernels.ema_update_", lambda *arguments, **options: 1 / 0)
    counters.make_calls(["cuda: ema"], quick=True)
    assert "FAILED cuda: ema" in capsys.readouterr().out


def test_without_a_profiler_or_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for reason in ("ncu is not on PATH", "needs an NVIDIA GPU"):
        run = subprocess.run([sys.executable, counters.__file__], env=environment, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (2, "")
        assert reason in run.stdout
        (tmp_path / "ncu").write_text("#!/bin/sh\n")
        (tmp_path / "ncu").chmod(0o755)


def test_every_kind_of_kernel_is_called():
    names = [name for name, *_ in counters.calls(quick=False)]
    assert len(set(names)) == len(names)
    for kind in ("triton: info_nce", "cuda: byol", "cuda: ema"):
        assert [name for name, *_ in counters.chosen([kind], quick=False)] == [n for n in names if n.startswith(kind)]
        assert any(name.startswith(kind) for name in names)
