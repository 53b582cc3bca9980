"""``python -m selfsup_kernels bench``: tiny runs of the command, what it writes checked by other means."""

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from selfsup_kernels.core import info
from selfsup_kernels.lab import fresh, pages
from selfsup_kernels.lab.bench import baselines, cli, results, tables, timing
from selfsup_kernels.lab.bench import suite as engine
from selfsup_kernels.lab.bench.workloads import case

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.unpoisoned

for package in ("rich", "psutil"):
    pytest.importorskip(package)
jsonschema = pytest.importorskip("jsonschema")
COMMITTED = sorted(p for op in cli.OPS for p in ROOT.glob(f"benchmarks/results/*/{op}.json"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(results.SCHEMA.read_text()))
OURS, REFERENCE = "selfsup_kernels", "impl='reference'"


def options(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


def bench(*arguments):
    return cli.main(options(*arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of everything, without fresh processes: (folder, the JSON file's data, what it printed)."""
    out = tmp_path_factory.mktemp("bench")
    sizes = ("--batch", "8,16", "--views", "2,3", "--dim", "8", "--model", "tiny", "--rounds", "5")
    columns = ("--op", "all", "--objective", "supcon_out,CLIP", "--impl", "auto,reference,cuda")
    columns += ("--vs", "eager,lightly,chunked")
    files = ("--json", out / "all.json", "--csv", out / "all.csv", "--results", out)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(fresh, "call", lambda target, *arguments, **_: engine.probe(*arguments))
        patch.setattr(timing.Rates, "__init__", functools.partialmethod(timing.Rates.__init__, size=64, copied=2**20))
        for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.utils"):
            patch.setitem(sys.modules, name, None)  # whether it is installed or not
        assert bench(*sizes, *columns, *files) == 0
    return out, json.loads((out / "all.json").read_text()), printed.getvalue()


# ---------------------------------------------------------------- what is written


def test_the_json_file_keeps_to_the_schema(run):
    _, data, _ = run
    VALIDATOR.validate(data)
    cases = [(r["op"], r.get("objective"), r.get("views"), r.get("batch"), r["part"]) for r in data["rows"]]
    sizes = [("info_nce", "supcon_out", (2, 3)), ("info_nce", "cross_view", (2, 3))]
    sizes += [("siglip", None, (2,)), ("byol", None, (2, 3))]
    losses = [(op, o, v, b, p) for op, o, views in sizes for v in views for b in (8, 16) for p in case(op).parts]
    assert cases == [*losses, ("ema", None, None, None, "update")]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["header"]["matrix_product_tflops"].clear(),
        lambda d: d["rows"].clear(),
        lambda d: d["rows"][0].update(part="update"),
        lambda d: d["rows"][0].update(fraction=0.5, tflops=0.0),
        lambda d: d["rows"][0].update(objective="clip"),
        lambda d: d["header"].update(commit="main"),
        lambda d: d["rows"][0]["times"]["eager"].update(p20_ms=-1.0),
    ],
)
def test_a_broken_file_does_not(run, change):
    data = json.loads(json.dumps(run[1]))
    change(data)
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_results_keep_to_the_schema(path):
    data = json.loads(path.read_text())
    VALIDATOR.validate(data)
    assert {row["op"] for row in data["rows"]} == {path.stem}
    assert path.parent.name == results.folder_name(data["header"])


def test_numbers_follow_from_each_other(run):
    _, data, _ = run
    bandwidth, product = data["header"]["in_place_gb_per_s"], data["header"]["matrix_product_tflops"]["float32"]
    for row in data["rows"]:
        assert set(row["times"]) == set(row["errors"])
        assert not set(row["times"]) & set(row["unavailable"])
        for times in row["times"].values():
            assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
            assert times["calls"] >= 5
        assert max(e for errors in row["errors"].values() for e in errors.values()) < 1e-5
        if row["op"] != "siglip" and row.get("objective") != "cross_view":
            absent = "takes two views" if (row["op"], row.get("views")) == ("info_nce", 3) else "absent"
            assert row["unavailable"]["lightly"].startswith(absent)
        assert row["unavailable"]["impl='cuda'"] == "takes CUDA tensors, these are on the CPU"
        seconds = row["times"][OURS]["p50_ms"] / 1e3
        if row["op"] in ("info_nce", "siglip"):
            products = {"forward": 1, "backward": 3, "both": 4}[row["part"]]
            others = row["views"] - (row.get("objective") == "cross_view")  # not within a view
            operations = products * row["views"] * others * row["batch"] ** 2 * row["dim"]
            if row["op"] == "siglip":  # not the square of all rows: one view against the other
                operations = {"forward": 2, "both": 6}[row["part"]] * row["batch"] ** 2 * row["dim"]
            assert row["tflops"] == pytest.approx(operations / seconds / 1e12)
            share(row, row["tflops"] / product)
            continue
        moved = 12 * row.get("numbers", 0)
        if row["op"] == "byol":
            moved = {"forward": 2, "backward": 3, "both": 5}[row["part"]] * row["views"] * row["batch"] * row["dim"] * 4
        assert row["gb_per_s"] == pytest.approx(moved / seconds / 1e9)
        share(row, row["gb_per_s"] / bandwidth)


def share(row, expected):
    assert row.get("fraction") == (None if expected > engine.LARGEST_SHARE else pytest.approx(expected))


def test_there_is_no_share_of_a_product_that_converts():
    """bfloat16 is measured with float32: slower than that, its product is not the device's limit."""
    rates = timing.Rates(timing.Clock("cpu", 1.0), ["bfloat16"], size=8, copied=2**10)
    assert set(rates.header()["matrix_product_tflops"]) == set(rates.sizes) == {"float32", "bfloat16"}
    rates.products = {"float32": 2.0, "bfloat16": 1.0}
    assert (rates.tflops("float32"), rates.tflops("bfloat16")) == (2.0, None)
    rates.products["bfloat16"] = 3.0
    assert rates.tflops("bfloat16") == 3.0


def test_a_slow_product_is_a_small_one(monkeypatch):
    monkeypatch.setattr(timing.Clock, "milliseconds", lambda clock, marks: timing.LONG_PRODUCT + 1)
    rates = timing.Rates(timing.Clock("cpu", 1.0), ["float32"], size=4 * timing.SMALLEST_PRODUCT, copied=2**10)
    assert rates.sizes == {"float32": timing.SMALLEST_PRODUCT}


def test_one_line_of_csv_for_each_case_part_and_baseline(run):
    out, data, _ = run
    with (out / "all.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [(row, name) for row in data["rows"] for name in (*row["times"], *row["unavailable"])]
    for line, (row, name) in zip(lines, expected, strict=True):
        assert (line["op"], line["part"], line["baseline"]) == (row["op"], row["part"], name)
        assert line["batch"] == str(row.get("batch", ""))
        if name in row["unavailable"]:
            assert line["unavailable"] == row["unavailable"][name]
            assert line["p50_ms"] == line["times_ours"] == ""
            continue
        assert float(line["p50_ms"]) == row["times"][name]["p50_ms"]
        assert float(line["times_ours"]) == pytest.approx(row["times"][name]["p50_ms"] / row["times"][OURS]["p50_ms"])
        assert int(line["peak_bytes"]) == row["peak_bytes"][name]
        assert (line["fraction"] != "") == (name == OURS and "fraction" in row)


def test_a_folder_for_the_device_with_a_file_for_each_operation(run):
    out, data, _ = run
    folder = out / results.folder_name(data["header"])
    assert folder.name.endswith(f"-{torch.get_num_threads()}-threads")
    for op in cli.OPS:
        rows = [row for row in data["rows"] if row["op"] == op]
        assert json.loads((folder / f"{op}.json").read_text()) == {"header": data["header"], "rows": rows}


def test_the_tables_say_what_the_files_say(run):
    out, data, printed = run
    assert data["header"]["device"] in printed
    assert "pip install lightly" in printed
    folder = out / results.folder_name(data["header"])
    files = [out / "all.json", out / "all.csv", *(folder / f"{op}.json" for op in cli.OPS)]
    *_, last = printed.splitlines()
    assert printed.splitlines()[-len(files) - 1 : -1] == [f"wrote {path}" for path in files]
    assert last == tables.answer(data["rows"])[0]
    row, printed = data["rows"][-1], printed[printed.index("EMA update, ") :]
    for name, times in row["times"].items():
        label = {OURS: "ours", REFERENCE: "ours, reference"}.get(name, name)
        found = re.search(rf"{label}" + 3 * r" +([\d.]+)", printed)
        expected = [times[key] for key in ("p20_ms", "p50_ms", "p80_ms")]
        assert [float(x) for x in found.groups()] == pytest.approx(expected, rel=0.01, abs=6e-4)


def test_without_kernels_the_first_line_says_so(run, capsys):
    header, rows = run[1]["header"], run[1]["rows"]
    for capability, first in ((results.PURE, tables.EAGER_ONLY), ("avx2", header["device"])):
        tables.show(pages.console(150), header | {"cpu_capability": capability}, rows)
        assert capsys.readouterr().out.startswith(first)


def test_a_loss_that_differs_is_not_the_fastest_baseline(run):
    """Unless there is no other: then the sentence asks."""
    row = copy.deepcopy(next(r for r in run[1]["rows"] if r["op"] == "info_nce" and r["part"] == "both"))
    fast = row["times"]["eager"] | {"p50_ms": 1e-6}
    row["times"], row["errors"] = row["times"] | {"my:loss": fast}, row["errors"] | {"my:loss": {"loss": 0.5}}
    assert "my:loss" not in tables.answer([row])[0]
    row["times"] = {name: row["times"][name] for name in (OURS, "my:loss")}
    assert tables.answer([row])[0].endswith("my:loss, the fastest baseline, takes 0.000 ms (not the same loss?).")
    assert tables.cells(row, "my:loss")[-1] == "5e-01 ?"


# ---------------------------------------------------------------- what does not fit, or fails

OWN = """
import time, torch

def mean(views):
    return views.square().mean()

def petabyte(views):
    return torch.empty(2**48, dtype=torch.float64).sum() + mean(views)

def hangs(views):
    time.sleep(600 if views.shape[1] > 16 else 0)
    return mean(views)

def wrong(views):
    raise ValueError("not today\\nor tomorrow")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(engine, "STARTING", 10_000.0)  # a busy machine takes its time to start a process


def measured(names, **options):
    """Rows from fresh processes."""
    made = engine.Suite("cpu", rates={"size": 64, "copied": 2**20}, **options)
    rows = made.measure(case("info_nce", batch=32, dim=8), names)
    made.rate()
    VALIDATOR.validate({"header": made.header, "rows": rows})
    return rows


def test_a_baseline_that_fails_hides_nothing(own, monkeypatch):
    monkeypatch.setattr(engine.host_memory, "available", lambda: 2 * 10**9)
    for row in measured([f"own_losses:{name}" for name in ("petabyte", "wrong", "mean")], rounds=3):
        assert set(row["times"]) == {"own_losses:mean"}
        assert row["unavailable"]["own_losses:petabyte"].startswith("out of memory: 2.0 GB were available")
        assert row["unavailable"]["own_losses:wrong"] == "ValueError: not today"
        assert row["errors"]["own_losses:mean"]["loss"] > 0.1
        assert row["notes"]["own_losses:mean"].endswith("against float64: not the same loss?")
        assert row["peak_bytes"]["own_losses:mean"] < 10**8


def test_what_takes_too_long_is_skipped(own, monkeypatch):
    monkeypatch.setattr(engine, "STARTING", 0.5)
    for row in measured(["own_losses:hangs"], seconds=0.1):
        assert row["unavailable"]["own_losses:hangs"].startswith("skipped: one call takes more than")
        assert row["times"] == {}
    assert engine.Suite._too_slow(types.SimpleNamespace(seconds=0.1), 5) == "skipped: one call takes 5 s (--seconds)"


def test_peak_memory_is_that_of_a_fresh_process():
    """Four matrices of 2048 x 2048 float32 and no less than two: what this process has freed hides none of it."""
    torch.ones(2**27).sum()
    found = fresh.call("selfsup_kernels.lab.bench.suite:probe", case("info_nce", batch=1024, dim=8).facts, "eager")
    assert 2 * 4 * 2048**2 < found["peak_bytes"] < 6 * 4 * 2048**2
    assert found["seconds"] > 0


def test_what_is_fast_is_called_more_often_and_preparing_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    calls = {"fast": (lambda: spend(5.0), lambda _: spend(0.001)), "slow": (lambda: None, lambda _: spend(0.004))}
    found = timing.in_turns(calls, seconds=0.0801)
    assert found["fast"]["p50_ms"] == pytest.approx(1.0)
    assert [found["slow"][key] for key in ("p20_ms", "p50_ms", "p80_ms")] == pytest.approx([4, 4, 4])
    assert found["slow"]["calls"] == 10
    assert found["fast"]["calls"] == 1 + 4 * 9
    assert timing.in_turns(calls, seconds=0.0)["slow"]["calls"] == timing.LEAST_ROUNDS


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("--op", "gan", "info_nce, siglip, byol, ema"),
        ("--op", "clip", "(an objective: --objective clip)"),
        ("--objective", "triplet", "cross_view, decoupled, or all"),
        ("--objective", "InfoNCE", "'supcon_out' (both views' rows are negatives) or 'cross_view'"),
        ("--impl", "gpu", "auto, reference"),
        ("--vs", "lightning", "lightly"),
        *(("--vs", v, "MODULE:CALLABLE") for v in ("os:no_such", "no_such_module:loss", "os:name", "unfinished:mean")),
        ("--batch", "1", ">= 2"),
        ("--views", "x", ">= 2"),
        ("--dim", "0", ">= 1"),
        ("--model", "AlexNet", "ResNet-50"),
        ("--dtype", ",", "bfloat16"),
        ("--device", "tpu", "cpu"),
        ("--seconds", "0", ">= 0.01"),
        ("--rounds", "2.5", "whole number"),
        ("--json", "/proc/none/out.json", "can be written"),
        ("--html", "/", "can be written"),
        ("--results", "/proc/none", "can be written"),
    ],
)
def test_bad_options(name, value, expected, capsys, tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text("def mean(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bench(name, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench: {name}: expected ")
    assert all(text in line for text in (expected, value))


def test_the_time_that_is_left():
    assert [cli.duration(seconds) for seconds in (12.3, 99, 100, 3600)] == ["12 s", "99 s", "2 min", "60 min"]


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(info, "_is_installed", lambda name: name != "rich")
    assert bench("--op", "ema") == 1
    assert capsys.readouterr().err == "bench: rich missing; run: pip install rich\n"


PML = "pytorch-metric-learning"


@pytest.mark.parametrize(
    ("arguments", "op", "names"),
    [
        ((), "info_nce", [OURS, "eager", "compile"]),
        ((), "ema", [OURS, "foreach_lerp", "loop"]),
        (("--vs", "none", "--impl", "cpu"), "byol", ["impl='cpu'"]),
        (("--vs", "all"), "info_nce", [OURS, *baselines.BASELINES["info_nce"]]),
        (("--vs", "all", "--objective", "clip"), "info_nce", [OURS, "eager", "compile", "open_clip"]),
        (("--vs", "lightly", "--objective", "dcl"), "info_nce", [OURS, "lightly"]),
        (("--vs", PML.upper(), "--op", "info_nce"), "info_nce", [OURS, PML, f"{PML} NTXentLoss"]),
        (("--vs", "swa_utils,lightly"), "ema", [OURS, "swa_utils", "lightly"]),
    ],
)
def test_names_of_baselines(arguments, op, names):
    assert {made.op: columns for made, columns in cli.Plan(options(*arguments)).cases}[op] == names


def test_objectives():
    plan = cli.Plan(options("--objective", "CLIP,nt-xent,cross_view,DCL", "--batch", "8"))
    assert [made.objective for made, _ in plan.cases] == ["cross_view", "supcon_out", "decoupled"]
    assert len(cli.Plan(options("--objective", "all", "--batch", "8")).cases) == 6
    with pytest.raises(cli.Wrong, match="--op info_nce"):
        cli.Plan(options("--op", "byol", "--objective", "clip"))


def test_sizes_and_types():
    plan = cli.Plan(options("--op", "info_nce,ema", "--batch", "16,8", "--dim", "4", "--dtype", "BF16,fp64,bf16"))
    losses = [(made.batch, made.dim, made.dtype) for made, _ in plan.cases if made.op == "info_nce"]
    assert losses == [(8, 4, "bfloat16"), (16, 4, "bfloat16"), (8, 4, "float64"), (16, 4, "float64")]
    assert [made.label for made, _ in plan.cases if made.op == "ema"] == [
        f"ema ResNet-50 float32 <- {dtype}" for dtype in ("bfloat16", "float64")
    ]
    assert plan.product_dtypes == ["bfloat16", "float64"]
