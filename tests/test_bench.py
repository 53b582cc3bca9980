"""``python -m selfsup_kernels bench``: tiny runs of the command, what it writes checked by other means."""

import argparse
import contextlib
import csv
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup_kernels import info
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.bench import cli, results, rivals, timing
from selfsup_kernels.lab.bench import suite as engine
from selfsup_kernels.lab.bench.workloads import case

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.unpoisoned

for package in ("rich", "psutil"):
    pytest.importorskip(package)
jsonschema = pytest.importorskip("jsonschema")
COMMITTED = sorted(p for op in cli.OPS for p in ROOT.glob(f"benchmarks/results/*/{op}.json"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(results.SCHEMA.read_text()))


def bench(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args([str(a) for a in arguments]))


@contextlib.contextmanager
def in_this_process():
    """Do what a fresh process would do in this one, and measure rates on little, to be quick."""

    def call(target, *arguments, **options):
        assert target == "selfsup_kernels.lab.bench.suite:probe"
        return engine.probe(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "call", call)
        patch.setattr(timing.Rates, "__init__", functools.partialmethod(timing.Rates.__init__, size=64, copied=2**20))
        yield


@pytest.fixture
def here():
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of everything: (folder, the JSON file's data, what it printed)."""
    out = tmp_path_factory.mktemp("bench")
    sizes = ("--batch", "8,16", "--views", "2,3", "--dim", "8", "--model", "tiny", "--rounds", "5")
    columns = ("--impl", "auto,reference", "--vs", "eager,lightly,chunked")
    files = ("--json", out / "all.json", "--csv", out / "all.csv", "--results", out)
    printed = io.StringIO()
    with in_this_process(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.utils"):
            patch.setitem(sys.modules, name, None)  # whether it is installed or not
        assert bench(*sizes, *columns, *files) == 0
    return out, json.loads((out / "all.json").read_text()), printed.getvalue()


# ---------------------------------------------------------------- what is written


def test_the_json_file_keeps_to_the_schema(run):
    _, data, _ = run
    VALIDATOR.validate(data)
    cases = [(r["op"], r.get("views"), r.get("batch"), r["part"]) for r in data["rows"]]
    losses = [(op, v, b, p) for op in ("info_nce", "byol") for v in (2, 3) for b in (8, 16) for p in case(op).parts]
    assert cases == [*losses, ("ema", None, None, "update")]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["header"].pop("torch"),
        lambda d: d["header"].update(date="today"),
        lambda d: d["header"]["matrix_product_tflops"].clear(),
        lambda d: d["rows"].clear(),
        lambda d: d["rows"][0].update(part="update"),
        lambda d: d["rows"][0].update(speed=3),
        lambda d: d["rows"][0].pop("tflops"),
        lambda d: d["rows"][0]["times"]["eager"].update(p20_ms=-1.0),
        lambda d: d["rows"][0]["unavailable"].update(lightly=""),
        lambda d: d["rows"][0]["peak_bytes"].update(eager=1.5),
        lambda d: d["rows"][-1].pop("model"),
        lambda d: d["rows"][-2].update(tflops=1.0),
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
        assert not set(row["times"]) & set(row["unavailable"])
        for times in row["times"].values():
            assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
            assert times["calls"] >= 5
        seconds = row["times"]["selfsup_kernels"]["p50_ms"] / 1e3
        if row["op"] == "info_nce":
            rows = row["views"] * row["batch"]
            products = {"forward": 1, "backward": 3, "both": 4}[row["part"]]
            assert row["tflops"] == pytest.approx(products * rows**2 * row["dim"] / seconds / 1e12)
            assert row["fraction"] == pytest.approx(row["tflops"] / product)
            continue
        if row["op"] == "byol":
            passes = {"forward": 2, "backward": 3, "both": 5}[row["part"]]
            moved = passes * row["views"] * row["batch"] * row["dim"] * 4
        else:
            moved = 12 * row["numbers"]
        assert row["gb_per_s"] == pytest.approx(moved / seconds / 1e9)
        assert row["fraction"] == pytest.approx(row["gb_per_s"] / bandwidth)


def test_errors_are_rounding_and_absent_rivals_are_listed(run):
    for row in run[1]["rows"]:
        assert set(row["errors"]) == set(row["times"])
        assert max(e for errors in row["errors"].values() for key, e in errors.items() if key != "rows") < 1e-5
        assert row["unavailable"]["lightly"].startswith("takes two views" if row.get("views") == 3 else "absent") or (
            row["op"] == "byol" and row["unavailable"]["lightly"].startswith("absent")
        )


def test_one_line_of_csv_for_each_case_part_and_rival(run):
    out, data, _ = run
    with (out / "all.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [(row, name) for row in data["rows"] for name in (*row["times"], *row["unavailable"])]
    assert len(lines) == len(expected)
    for line, (row, name) in zip(lines, expected, strict=True):
        assert (line["op"], line["part"], line["rival"]) == (row["op"], row["part"], name)
        assert line["batch"] == str(row.get("batch", ""))
        if name in row["unavailable"]:
            assert line["unavailable"] == row["unavailable"][name]
            assert line["p50_ms"] == line["times_ours"] == ""
            continue
        ours = row["times"]["selfsup_kernels"]["p50_ms"]
        assert float(line["p50_ms"]) == row["times"][name]["p50_ms"]
        assert float(line["times_ours"]) == pytest.approx(row["times"][name]["p50_ms"] / ours)
        assert int(line["peak_bytes"]) == row["peak_bytes"][name]
        assert (line["fraction"] != "") == (name == "selfsup_kernels")


def test_a_folder_for_the_device_with_a_file_for_each_operation(run):
    out, data, _ = run
    folder = out / results.folder_name(data["header"])
    assert folder.name.endswith(f"-{torch.get_num_threads()}-threads")
    for op in ("info_nce", "byol", "ema"):
        part = json.loads((folder / f"{op}.json").read_text())
        assert part["header"] == data["header"]
        assert part["rows"] == [row for row in data["rows"] if row["op"] == op]


def test_the_tables_say_what_the_files_say(run):
    _, data, printed = run
    assert data["header"]["device"] in printed
    assert "absent: " in printed
    assert "pip install lightly" in printed
    row = data["rows"][-1]
    printed = printed[printed.index("EMA update, ") :]
    for name, times in row["times"].items():
        label = {"selfsup_kernels": "ours", "impl='reference'": "ours, reference"}.get(name, name)
        line = re.search(rf"{label} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)x", printed)
        p20, p50, p80, factor = map(float, line.groups())
        assert (p20, p50, p80) == pytest.approx((times["p20_ms"], times["p50_ms"], times["p80_ms"]), rel=0.01, abs=6e-4)
        assert factor == pytest.approx(times["p50_ms"] / row["times"]["selfsup_kernels"]["p50_ms"], rel=0.05)


def test_several_implementations_and_types(here, tmp_path):
    path = tmp_path / "out.json"
    sizes = ("--op", "info_nce", "--batch", "8", "--dim", "8", "--dtype", "bf16,float64", "--rounds", "3")
    assert bench(*sizes, "--impl", "reference,cuda", "--vs", "none", "--json", path) == 0
    data = json.loads(path.read_text())
    VALIDATOR.validate(data)
    assert (
        {row["dtype"] for row in data["rows"]}
        == {"bfloat16", "float64"}
        == set(data["header"]["matrix_product_tflops"])
    )
    for row in data["rows"]:
        assert list(row["times"]) == ["impl='reference'"]
        assert row["unavailable"] == {"impl='cuda'": "takes CUDA tensors, these are on the CPU"}
        assert row["fraction"] > 0


# ---------------------------------------------------------------- what does not fit, or fails

OWN = """
import os, signal, time, torch

clock, later = time.perf_counter, 0.0
time.perf_counter = lambda: clock() + later

def mean(views):
    return views.square().mean()

def petabyte(views):
    return torch.empty(2**48, dtype=torch.float64).sum() + mean(views)

def greedy(views):
    return sum(torch.ones(2**28).sum() for _ in [torch.ones(2**28) for _ in range(4)]) + mean(views)

def killed(views):
    os.kill(os.getpid(), signal.SIGKILL)

def slow(views):
    global later
    later += 5000 if views.shape[1] > 16 else 0
    return mean(views)

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


def measured(names, batch=32, **options):
    made = engine.Suite("cpu", rates={"size": 64, "copied": 2**20}, **options)
    rows = made.measure(case("info_nce", batch=batch, dim=8), names)
    made.rate()
    VALIDATOR.validate({"header": made.header, "rows": rows})
    return rows


def test_a_rival_that_fails_hides_nothing(own, monkeypatch):
    """In fresh processes, under the memory that is left."""
    monkeypatch.setattr(engine.host_memory, "available", lambda: 2 * 10**9)
    names = [rivals.OURS, *(f"own_losses:{name}" for name in ("petabyte", "greedy", "killed", "wrong", "mean"))]
    rows = measured(names, rounds=3)
    for row in rows:
        assert set(row["times"]) == {rivals.OURS, "own_losses:mean"}
        for name in ("petabyte", "greedy", "killed"):
            assert row["unavailable"][f"own_losses:{name}"].startswith("out of memory: 2.0 GB were available")
        assert row["unavailable"]["own_losses:wrong"] == "ValueError: not today"
        assert row["errors"]["own_losses:mean"]["loss"] > 0.1
        assert row["peak_bytes"][rivals.OURS] < 10**8


def test_what_takes_too_long_is_skipped(own, monkeypatch):
    """The slow one by its own clock; how long ours takes does not matter."""
    for row in measured([rivals.OURS, "own_losses:slow"], seconds=1000.0, rounds=3):
        assert set(row["times"]) == {rivals.OURS}
        assert re.fullmatch(r"skipped: one call takes 50\d\d s \(--seconds\)", row["unavailable"]["own_losses:slow"])
    monkeypatch.setattr(engine, "STARTING", 0.5)
    for row in measured(["own_losses:hangs"], seconds=0.1):
        assert row["unavailable"]["own_losses:hangs"].startswith("skipped: one call takes more than")
        assert row["times"] == {}


@pytest.mark.parametrize(("device", "number"), [("cuda", 3), ("cuda:1", 1)])
def test_the_gpu_of_a_run_is_made_the_current_one(device, number, monkeypatch):
    """By PyTorch's own function, which refuses a device without a number."""
    told = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", told.append, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(timing, "Rates", lambda *_: argparse.Namespace(header=dict))
    monkeypatch.setattr(results, "header", lambda clock, ops: {})
    engine.Suite(device)
    assert told == [number]


def test_peak_memory_is_that_of_a_fresh_process():
    """Four matrices of 2048 x 2048 float32 and no less than two: what this process has freed hides none of it."""
    torch.ones(2**27).sum()
    found = fresh.call("selfsup_kernels.lab.bench.suite:probe", case("info_nce", batch=1024, dim=8).facts, "eager")
    assert 2 * 4 * 2048**2 < found["peak_bytes"] < 6 * 4 * 2048**2
    assert found["seconds"] > 0


# ---------------------------------------------------------------- times


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
    assert timing.in_turns({}) == {}


def test_where_nothing_can_be_measured_nothing_is_allocated(here, monkeypatch):
    told = []
    made = engine.Suite("cpu", rounds=3, advance=told.append)
    monkeypatch.setattr(engine.Suite, "_inputs", lambda *_: pytest.fail("inputs that nothing takes"))
    (row, *_) = made.measure(case("info_nce", batch=32, dim=8), ["nosuchmodule:loss"])
    assert row["times"] == {}
    assert row["unavailable"] == {"nosuchmodule:loss": "absent: No module named 'nosuchmodule'"}
    assert len(told) == 2


# ---------------------------------------------------------------- arguments

BAD = {
    "--op": ("info-nce", "info_nce, byol, ema"),
    "--impl": ("gpu", "auto, reference"),
    "--vs": ("lightning", "lightly"),
    "--batch": ("1", "at least 2"),
    "--views": ("2,x", "at least 2"),
    "--dim": ("0", "at least 1"),
    "--model": ("AlexNet", "ResNet-50"),
    "--dtype": (",", "bfloat16"),
    "--device": ("tpu", "cpu"),
    "--seconds": ("0", "at least"),
    "--rounds": ("2.5", "whole number"),
    "--json": ("/proc/none/out.json", "can be written"),
    "--html": ("/", "can be written"),
    "--results": ("/proc/none", "can be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, capsys):
    value, expected = BAD[name]
    assert bench(name, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench: {name}: expected ")
    assert expected in line
    assert repr(value) in line or value in line


def test_a_loss_that_cannot_be_imported(capsys, tmp_path, monkeypatch):
    (tmp_path / "unfinished_losses.py").write_text("def mean(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    for value in ("os:no_such_function", "no_such_module:loss", "os:name", "unfinished_losses:mean", ".os:name"):
        assert bench("--vs", value) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bench: --vs: expected MODULE:CALLABLE")
        assert repr(value) in line


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(info, "_is_installed", lambda name: name != "rich")
    assert bench("--op", "ema") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "bench: rich missing; run: pip install rich"


def test_names_of_rivals(capsys):
    def columns(vs, op="all", impl="auto"):
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        plan = cli.Plan(parser.parse_args(["--op", op, "--impl", impl, *(["--vs", vs] if vs else [])]))
        return {case.op: names for case, names in plan.cases}

    assert columns(None)["info_nce"] == ["selfsup_kernels", "eager", "compile"]
    assert columns(None)["ema"] == ["selfsup_kernels", "foreach_lerp", "loop"]
    assert columns("none", impl="cpu")["byol"] == ["impl='cpu'"]
    assert columns("all")["info_nce"][1:] == list(rivals.RIVALS["info_nce"])
    both = ["pytorch-metric-learning", "pytorch-metric-learning NTXentLoss"]
    assert columns("Pytorch-Metric-Learning", "info_nce")["info_nce"][1:] == both
    assert {n: cli.choices("dtype", n, {"a": 1, "B": 2}) for n in ("b", "a,B,A")} == {"b": [2], "a,B,A": [1, 2]}
    assert columns("swa_utils,lightly")["ema"][1:] == ["swa_utils", "lightly"]


def test_light_to_start():
    """The options need no torch; tables need no pictures."""
    code = (
        "import sys; from selfsup_kernels.lab.bench import cli; import argparse\n"
        "assert not {'rich', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "p = argparse.ArgumentParser(); cli.add_arguments(p)\n"
        "from selfsup_kernels.lab.bench import timing; import functools\n"
        "timing.Rates.__init__ = functools.partialmethod(timing.Rates.__init__, size=64, copied=2**20)\n"
        "o = p.parse_args('--op byol --batch 8 --dim 8 --vs none --rounds 3'.split())\n"
        "assert cli.main(o) == 0\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BYOL loss" in done.stdout
