"""Test the reading of the hardware's counters without a GPU: the profiler is a stand-in."""

import sys

import pytest
import torch
from helpers import benchmarks_script

counters = benchmarks_script("gpu_counters")

pytestmark = pytest.mark.unpoisoned

PROFILER = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
assert arguments[arguments.index("--clock-control") + 1] == "none"
assert arguments[arguments.index("--profile-from-start") + 1] == "off"
pathlib.Path(arguments[arguments.index("--export") + 1] + ".ncu-rep").write_text(arguments[-1])
sys.exit("byol" in arguments[-1])
"""


def test_each_call_is_made_under_the_profiler_and_a_failure_hides_none(tmp_path, monkeypatch, capsys):
    ncu = tmp_path / "ncu"
    ncu.write_text(PROFILER.format(python=sys.executable))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert counters.main(["--out", str(tmp_path / "out"), "--only", "byol", "ema"]) == 1
    made = [path.read_text() for path in sorted((tmp_path / "out").iterdir())]
    assert made == ["cuda: byol V1 B262144 D256 float32", "cuda: ema ResNet-50 float32 <- float32"]
    assert capsys.readouterr().out == f"gpu-counters: {made[0]}: ncu failed\n"
    assert counters.main(["--out", str(tmp_path / "out"), "--only", "ema"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_profiler_or_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    for reason in ("ncu is not on PATH", "needs an NVIDIA GPU"):
        assert counters.main([]) == 2
        assert reason in capsys.readouterr().out
        (tmp_path / "ncu").write_text("#!/bin/sh\n")
        (tmp_path / "ncu").chmod(0o755)


def test_calls(monkeypatch):
    """Each kind of kernel, and as small ones on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {name.split()[1] for name in counters.calls()} == {"info_nce", "byol", "ema"}
    for workload, _ in counters.calls(quick=True).values():
        counters.make_call(workload, "auto")
