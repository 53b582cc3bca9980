"""python -m selfsup_kernels profile: what it trains, what it writes, and whether its advice is right."""

import copy
import importlib
import json
from pathlib import Path

import browser
import pytest
import torch
from profile_cases import Encoder, SquareLoss, batches
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.__main__ import main
from selfsup_kernels.core import info
from selfsup_kernels.lab import fresh, host_memory
from selfsup_kernels.lab.profile import cli, largest, memory, parts, report, workload
from selfsup_kernels.lab.profile.workload import METHODS, Workload

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(sk.__file__).parent / "lab" / "profile" / "profile.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize(
    ("method", "views"), [(name, v) for name in METHODS for v in (2, 3) if v == 2 or name not in workload.TWO_TOWERS]
)
def test_eager_is_the_same_training(method, views, monkeypatch):
    """The comparison is between two ways to the same numbers: loss, gradients and targets over three steps."""
    monkeypatch.setattr(workload, "QUEUE", 256)
    states = {}
    for variant in workload.VARIANTS:
        work = Workload(method, variant, batch=16, views=views, image_size=8, dim=16, accumulate=2)
        trainer = workload.Trainer(work)
        trainer.method.double()
        losses = []
        trainer.method.register_forward_hook(lambda module, args, value, losses=losses: losses.append(value.item()))
        for batch in workload.loader(work, 3):
            trainer.batch([view.double() for view in batch])
        states[variant] = losses, trainer.method.state_dict()
    assert len(states["ours"][0]) == 6
    assert states["ours"][0] == pytest.approx(states["eager"][0], rel=1e-4)
    for name, value in states["ours"][1].items():
        torch.testing.assert_close(value, states["eager"][1][name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("method", METHODS)
def test_all_networks_are_compiled(method):
    made = workload.build(Workload(method, compile=True, encoder="profile_cases:tiny", dim=4))
    networks = list(workload.called(made))
    assert all(network._compiled_call_impl is not None for network in networks)
    owned = {id(p) for network in networks for p in network.parameters()}
    assert all(id(p) in owned for name, p in made.named_parameters() if not name.startswith("loss."))


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"amp": "fp16"}, {"encoder": "profile_cases:tiny"}])
def test_variants_of_the_training(options):
    trainer = workload.Trainer(Workload(batch=8, **options))
    before = copy.deepcopy(list(trainer.method.parameters()))
    for views in workload.loader(trainer.work, 2):
        assert [tuple(v.shape) for v in views] == [(8, 3, 16, 16)] * 2
        assert not torch.equal(*views)
        trainer.batch(views)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.method.parameters(), strict=True))


def grows(peak, bound):
    """Stand for a fresh process whose peak is ``peak(batch)`` and is refused above the bound."""

    def call(target, work, *arguments, memory_limit=None):
        if peak(work["batch"]) > bound:
            raise fresh.OutOfMemory("refused")
        return {"batch": work["batch"], "peak_bytes": round(peak(work["batch"])), "seconds": 1e-4 * work["batch"]}

    return call


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("truth", [8, 100, 255, 256, 3000, 12345, 50_000])
def test_search_finds_the_largest_batch(monkeypatch, truth, accumulate):
    monkeypatch.setattr(fresh, "call", grows(lambda batch: batch, truth))
    growth = largest.measure(Workload(accumulate=accumulate), truth, 256, 1e9)
    told = growth.json()
    assert told["batch"] % accumulate == 0
    assert 0.95 * truth - accumulate < told["batch"] <= truth < told["refused"]
    assert (told["or_more"], told["peak_bytes"]) == (False, told["batch"])
    assert len(growth.points) < 16


def test_search_where_nothing_fits_time_is_short_or_no_peak_is_told(monkeypatch):
    monkeypatch.setattr(fresh, "call", grows(lambda batch: 3e9, 2e9))
    growth = largest.measure(Workload(accumulate=2), int(2e9), 256, 1e9)
    assert (growth.json()["batch"], growth.refused, growth.points) == (0, 4, [])
    monkeypatch.setattr(fresh, "call", grows(lambda batch: 3e8, 2e12))
    told = largest.measure(Workload(), int(2e12), 256, 0.0).json()
    assert (told["batch"], told["or_more"], report.batch_words(told)) == (256, True, "≥ 256")
    (note,) = report.notes({"cases": [], "largest": {"variants": {"ours": told}}})
    assert "--seconds" in note
    monkeypatch.setattr(fresh, "call", lambda *_, **__: pytest.fail("a process for nothing"))
    monkeypatch.setattr(host_memory, "status", lambda name: None)
    told = largest.measure(Workload(), int(2e9), 256, 1e9).json()
    assert (told["batch"], report.batch_words(told)) == (None, "not known")


def test_the_largest_batch_of_a_gpu_is_searched_under_the_limit(monkeypatch):
    """Its process takes that share of the GPU, and no more."""
    told = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    workload.claim("cuda:1", 16 * 10**9)
    workload.claim("cuda")
    workload.claim("cpu", 10**9)
    assert told == ["cuda:1", 0.2, "0"]
    asked = []
    point = {"batch": 256, "peak_bytes": 1, "seconds": 1.0}
    monkeypatch.setattr(fresh, "call", lambda *arguments, **options: asked.append((arguments, options)) or point)
    work = Workload(device="cuda")
    assert largest.Growth(work, 123).measure(256)
    assert asked == [(("selfsup_kernels.lab.profile.workload:grown", work._asdict(), 123), {})]


def peak_of_an_allocation(size):
    before = memory.process_peak("cpu")
    torch.ones(size, dtype=torch.uint8)
    return [before, memory.process_peak("cpu")]


linux = pytest.mark.skipif(host_memory.status("VmPeak") is None, reason="this system tells no private memory")


@linux
def test_peak_of_a_known_allocation(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    before, after = fresh.call("test_profile_command:peak_of_an_allocation", 2**30)
    assert 0.7 * 2**30 < after - before < 1.1 * 2**30


@linux
def test_the_peak_is_what_a_limit_of_the_memory_counts(monkeypatch):
    """Real steps in fresh processes: a tenth more than their peak lets them run, a tenth less refuses them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # Threads that wait for each other's lock get heaps of their own: how many depends on how busy the machine is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    # Small images, so that the eager loss' matrices are what grows.
    work = Workload(variant="eager", encoder="profile_cases:tiny", dim=32, image_size=8)
    measured = largest.measure(work, 10**11, 1024, 0.0)
    (point,) = measured.points
    assert largest.Growth(work, int(1.1 * point["peak_bytes"])).measure(1024)
    limited = largest.Growth(work, int(0.9 * point["peak_bytes"]))
    assert not limited.measure(1024)
    assert limited.refused == 1024


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--method", "dino"],
            f"--method: expected one of {', '.join(METHODS)}, got 'dino'",
        ),
        (["--method", "clip", "--views", "3"], "--views: expected 2 with --method clip, got '3'"),
        (["--batch", "12,x"], "--batch: expected comma-separated whole numbers >= 2, got '12,x'"),
        (["--batch", "10", "--accumulate", "4"], "--batch: expected multiples of --accumulate 4"),
        (["--views", "1"], "--views: expected a whole number >= 2, got '1'"),
        (["--steps", "1"], "--steps: expected a whole number >= 2"),
        (["--amp", "int8"], "--amp: expected one of bf16, fp16, got 'int8'"),
        (["--memory", "lots"], "--memory: expected an amount of memory such as 8GB"),
        (["--memory", "1e400"], "--memory: expected an amount of memory"),
        (["--seconds", "-3"], "--seconds: expected a number > 0, got '-3'"),
        (["--device", "cuda:77"], "--device: expected one of cpu"),
        (["--out", "/proc/none"], "--out: expected a folder that can be written, got '/proc/none'"),
        (["--encoder", "nosuchmodule:f"], "--encoder: expected convnet, MODULE:CALLABLE or a name of timm"),
        (["--encoder", "profile_cases:wrong"], "(2, features) of (2, 3, 16, 16), got 'profile_cases:wrong (ValueErr"),
        (["--encoder", "no-such-net"], "no-such-net ("),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, words):
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("profile: --")
    assert error.count("\n") == 1
    assert words in error


def test_amounts_and_default_batches():
    amounts = {"8GB": 8 * 10**9, "500 MiB": 500 << 20, "1.5tb": 15 * 10**11, "123": 123}
    assert {text: cli.amount("memory", text, "", cli.UNITS) for text in amounts} == amounts
    assert cli.batches(None, 4, (256, 1024)) == [256, 1024]
    assert cli.batches(None, 512, (256, 1030)) == [1024]
    assert cli.batches("64,16,64", 1, ()) == [16, 64]


def test_missing_packages_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(info, "_is_installed", lambda name: name != "jinja2")
    assert main(["profile"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run: pip install " in error


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole command on a tiny case, its fresh processes replaced by this one, eager out of memory at one batch."""
    out = tmp_path_factory.mktemp("profile")

    def call(target, work, *arguments, **options):
        if work["batch"] > 50 or (target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 24):
            raise fresh.OutOfMemory("out of memory")
        if target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 12:
            raise fresh.Failed("first line\nValueError: last line")
        module, function = target.split(":")
        return json.loads(json.dumps(getattr(importlib.import_module(module), function)(work, *arguments)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "call", call)
        options = "--method BYOLContrast --encoder profile_cases:tiny --batch 8,12,24 --accumulate 2 --dim 16 --steps 2"
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        status = main(["profile", *options.split(), "--seconds", "1e8", "--memory", "30GB", "--out", str(out)])
        torch.set_num_threads(before)
    return out, status, json.loads((out / "profile.json").read_text())


def test_command_end_to_end(written):
    out, status, results = written
    assert status == 0
    VALIDATOR.validate(results)
    assert results["workload"]["method"] == "byol_contrast"
    told = {(case["batch"], case["variant"]): case for case in results["cases"]}
    assert told[24, "eager"]["status"] == "out of memory"
    assert told[12, "eager"]["status"] == "failed"
    assert told[12, "eager"]["reason"] == "ValueError: last line"
    measured = [key for key, case in told.items() if case["status"] == "measured"]
    assert measured == [(8, "ours"), (8, "eager"), (12, "ours"), (24, "ours")]
    for s, trace in ((told[key]["summary"], told[key]["trace"]) for key in measured):
        spent = {row["part"]: row["seconds"] for row in s["parts"]}
        assert all(spent[part] > 0 for part in parts.PARTS)
        assert sum(spent.values()) == pytest.approx(s["marked_step_seconds"])
        assert s["named_seconds"] == pytest.approx(sum(spent[p] for p in parts.NAMED))
        events = json.loads((out / trace).read_text())["traceEvents"]
        assert "selfsup_kernels: EMA" in {event["name"] for event in events}
    share = told[24, "ours"]["summary"]["loss_share"]
    assert results["answer"].startswith(f"At batch 24 the loss takes {report.percent(share)} of a step of ")
    assert "ms (ours) and an unknown share (eager: does not fit in " in results["answer"]
    for growth in results["largest"]["variants"].values():
        assert growth["batch"] % 2 == 0
        assert 46 <= growth["batch"] <= 50
    page = (out / "report.html").read_text()
    assert page.index(results["answer"]) < page.index("<h2>")
    assert "http" not in page


def test_schema_refuses_what_is_broken(written):
    _, _, results = written
    for change in (
        lambda r: r.pop("answer"),
        lambda r: r["cases"][0].update(status="measured", summary=None),
        lambda r: r["cases"][0]["summary"]["parts"].pop(),
        lambda r: r["cases"][0]["summary"]["parts"][0].update(seconds=-1),
        lambda r: r["cases"][0]["summary"].update(loss_share=1.5),
        lambda r: r["cases"][0].update(variant="theirs"),
        lambda r: r["largest"]["variants"]["ours"].update(batch=-1),
        lambda r: r["workload"].update(method="dino"),
    ):
        broken = copy.deepcopy(results)
        change(broken)
        assert not VALIDATOR.is_valid(broken)


def test_pages_in_a_browser(written, tmp_path):
    model, criterion = Encoder(), SquareLoss()
    with sk.profile.steps(model, loss=criterion, out=tmp_path) as run:
        for x in run(batches(9)):
            criterion(model(x)).backward()
    results = json.loads((tmp_path / "profile.json").read_text())
    VALIDATOR.validate(results)
    assert results["answer"].startswith("The loss takes ")
    for page in (written[0] / "report.html", tmp_path / "report.html"):
        browser.check_report(page)
        with browser.open_page(page) as opened:
            assert len(opened.query_selector_all("img")) == 1
            assert opened.inner_text("h1") == json.loads((page.parent / "profile.json").read_text())["answer"]


def test_report_of_a_short_loop(tmp_path):
    with sk.profile.steps(nn.Linear(4, 4)) as run:
        list(run(batches(1)))
    run.report(tmp_path)
    VALIDATOR.validate(json.loads((tmp_path / "profile.json").read_text()))
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_timm_names():
    timm = pytest.importorskip("timm")
    assert timm.is_model("resnet18")
    assert workload.width(workload.make_encoder("resnet18"), 32) == 512
