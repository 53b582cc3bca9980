"""The benchmark of the host's time: it runs, and its ratios are those of its own times."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import benchmarks_script

from selfsup_kernels.core import backends

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def host():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield benchmarks_script("host")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_measures_every_case(host, tmp_path, capsys):
    path = tmp_path / "host.json"
    rows = host.main(["--rounds", "2", "--calls", "1", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2
    assert "GPU" not in lines[0]
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert {"torch", "device", "threads"} <= set(written["header"])
    medians = {row["name"]: row["median_us"] for row in rows}
    for row in rows:
        assert 0 < row["minimum_us"] <= row["median_us"]
        assert row["ratio"] == (row["median_us"] / medians[row["baseline"]] if row["baseline"] else None)
    assert {row["name"].split(",")[0] for row in rows if row["baseline"]} == {
        "info_nce_loss",
        "byol_loss",
        "ema_update_",
        "EMA.update",
    }


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")
def test_the_stub_replays_the_launches_of_a_gpu():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "host.py", "--device", "stub", "--rounds", "1", "--calls", "1"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    few, many = map(int, re.findall(r"info_nce_loss, (\d+) launches", done.stdout))
    assert few < many
    assert "A launch more takes" in done.stdout


def test_a_ratio_is_that_of_the_medians(host):
    times = {"ours": [5.0, 9.0, 100.0], "theirs": [3.0, 2.0, 50.0]}
    row = host.row(host.Case("ours", None, "theirs", 2.0), times)
    assert row["ratio"] == statistics.median(times["ours"]) / 3
    assert row["minimum_us"] == 5
    assert host.row(host.Case("theirs", None), times)["ratio"] is None


def test_one_case_keeps_the_baselines(host, capsys):
    rows = host.main(["--rounds", "1", "--calls", "1", "--only", "byol"])
    assert [row["name"] for row in rows if row["baseline"]] == ["byol_loss, one pair"]
