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
from selfsup_kernels.lab.profile import cli, command, largest, memory, parts, report, workload
from selfsup_kernels.lab.profile.workload import METHODS, Workload

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(sk.__file__).parent / "lab" / "profile" / "profile.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"amp": "fp16"}, {"encoder": "profile_cases:tiny"}])
def test_variants_of_the_training(options):
    trainer = workload.Trainer(Workload(batch=8, **options))
    before = copy.deepcopy(list(trainer.method.parameters()))
    for views in workload.loader(trainer.work, 2):
        assert [tuple(v.shape) for v in views] == [(8, 3, 16, 16)] * 2
        assert not torch.equal(*views)
        trainer.batch(views)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.method.parameters(), strict=True))


def test_fit_recovers_what_it_was_made_of():
    sizes = [100, 200, 400, 800]
    for coefficients in ((3e8, 2e5, 70.0), (3e8, 2e5, 0.0), (0.0, 0.0, 5.0), (1e6, 0.0, 0.0)):
        found = largest.fit(sizes, [largest.value(coefficients, b) for b in sizes])
        assert found == pytest.approx(coefficients, rel=1e-6, abs=1e-3)
        batch = largest.solve(found, 2e9)
        assert largest.value(found, batch) <= 2e9 * (1 + 1e-9)
        assert largest.value(found, batch + 1) > 2e9 or batch == largest.LIMIT
    # Memory that shrinks: no negative growth is believed.
    assert largest.fit(sizes, [5.0, 4.0, 3.0, 2.0]) == pytest.approx((3.5, 0, 0))
    assert largest.fit([10, 20], [100.0, 200.0]) == pytest.approx((0, 10, 0), abs=1e-6)
    assert largest.solve((3e9, 1.0, 0.0), 2e9) == 0


def invented(coefficients, bound):
    """A measurement of memory that grows by the coefficients and is refused above the bound."""

    def call(target, work, memory_limit=None):
        peak = largest.value(coefficients(work["batch"]), work["batch"])
        if peak > bound:
            raise fresh.OutOfMemory("refused")
        return {"batch": work["batch"], "peak_bytes": round(peak), "seconds": 1e-4 * work["batch"]}

    return call


GROWTHS = {
    "linear": lambda batch: (3e8, 4e4, 0.0),
    "quadratic": lambda batch: (3e8, 4e4, 60.0),
    # Small batches have their peak in the encoder, large ones in the loss.
    "two regimes": lambda batch: (3e8, 2e5, 0.0) if batch < 1500 else (3e8, 2e4, 120.0),
    "a fall": lambda batch: (6e8, 2e5, 0.0) if batch < 3000 else (1e8, 1e5, 0.0),
}


@pytest.mark.parametrize("coefficients", GROWTHS.values(), ids=GROWTHS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_search_finds_the_largest_batch(monkeypatch, coefficients, accumulate):
    bound = 2_000_000_000
    monkeypatch.setattr(fresh, "call", invented(coefficients, bound))
    growth = largest.measure(Workload(accumulate=accumulate), bound, 256, 1e9)
    truth = max(b for b in range(accumulate, 60_000, accumulate) if largest.value(coefficients(b), b) <= bound)
    assert growth.largest % accumulate == 0
    assert growth.largest == pytest.approx(truth, rel=0.02)


def test_search_where_nothing_fits_time_is_short_or_no_peak_is_told(monkeypatch):
    monkeypatch.setattr(fresh, "call", invented(lambda batch: (3e9, 1.0, 0.0), 2e9))
    growth = largest.measure(Workload(), int(2e9), 256, 1e9)
    assert (growth.largest, growth.json()["points"]) == (0, [])
    monkeypatch.setattr(fresh, "call", invented(lambda batch: (3e8, 4e4, 0.0), 2e12))
    growth = largest.measure(Workload(), int(2e12), 256, 0.0)
    assert len(growth.points) <= 2
    assert growth.largest > 100 * growth.points[-1]["batch"]
    told = growth.json()
    assert (told["batch"], told["or_more"]) == (8 * growth.points[-1]["batch"], True)  # and not millions, unseen
    assert report.batch_words(told) == f"{told['batch']:,} or more"
    monkeypatch.setattr(fresh, "call", lambda *_, **__: pytest.fail("a process for nothing"))
    monkeypatch.setattr(host_memory, "status", lambda name: None)
    growth = largest.measure(Workload(), int(2e9), 256, 1e9)
    assert (growth.largest, growth.json()["batch"], growth.peak(256)) == (None, None, None)


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
    assert asked == [(("selfsup_kernels.lab.profile.workload:grown", work.json(), 123), {})]


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
@pytest.mark.parametrize("variant", ["eager", "ours"])
def test_advice_on_the_largest_batch_is_right_within_a_tenth(variant, monkeypatch):
    """Real steps in fresh processes, under a real limit of their private memory."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # Threads that wait for each other's lock get heaps of their own: how many depends on how busy the machine is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    bound = {"eager": 700_000_000, "ours": 500_000_000}[variant]
    # Small images, so that the eager loss' matrices are what grows; larger ones where images are all there is.
    size = {"eager": 8, "ours": 32}[variant]
    work = Workload(variant=variant, encoder="profile_cases:tiny", dim=32, image_size=size)
    growth = largest.measure(work, bound, 512, 1e9)  # twelve batches, however slow
    advice = growth.largest
    assert growth.measure(int(advice / 1.1))
    assert not growth.measure(int(1.1 * advice))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "dino"], "--method: expected one of simclr, cmc, moco, byol, fusion, got 'dino'"),
        (["--batch", "12,x"], "--batch: expected a whole number >= 2, got 'x'"),
        (["--batch", "0"], "--batch: expected a whole number >= 2, got '0'"),
        (["--batch", "10", "--accumulate", "4"], "--batch: expected multiples of --accumulate 4"),
        (["--batch", "4", "--accumulate", "4"], "at least 2 samples in a part"),
        (["--views", "1"], "--views: expected a whole number >= 2, got '1'"),
        (["--steps", "1"], "--steps: expected a whole number >= 2"),
        (["--amp", "int8"], "--amp: expected one of bf16, fp16, got 'int8'"),
        (["--memory", "lots"], "--memory: expected an amount of memory such as 8GB"),
        (["--memory", "8 parsec"], "--memory: expected an amount of memory"),
        (["--seconds", "-3"], "--seconds: expected a number > 0, got '-3'"),
        (["--device", "cuda:77"], "--device: expected one of cpu"),
        (["--out", "/proc/none"], "--out: expected a folder that can be written, got '/proc/none'"),
        (["--encoder", "nosuchmodule:f"], "--encoder: expected convnet, MODULE:CALLABLE or a name of timm"),
        (["--encoder", "math:pi"], "TypeError"),
        (["--encoder", "profile_cases:wrong"], "(2, features) of (2, 3, 16, 16), got 'profile_cases:wrong (ValueErr"),
        (["--encoder", "profile_cases:raises"], "RuntimeError"),
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
    assert {text: cli.amount("memory", text) for text in amounts} == amounts
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
        if target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 24:
            raise fresh.OutOfMemory("out of memory")
        if target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 12:
            raise fresh.Failed("first line\nValueError: last line")
        module, function = target.split(":")
        return json.loads(json.dumps(getattr(importlib.import_module(module), function)(work, *arguments)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "call", call)
        patch.setattr(command, "GROWTH", 6e-8)  # no batch is left out for lack of time, and none is looked for
        options = "--method fusion --encoder profile_cases:tiny --batch 8,12,24 --accumulate 2 --dim 16 --steps 2"
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        status = main(["profile", *options.split(), "--seconds", "1e8", "--memory", "30GB", "--out", str(out)])
        torch.set_num_threads(before)
    return out, status, json.loads((out / "profile.json").read_text())


def test_command_end_to_end(written):
    out, status, results = written
    assert status == 0
    VALIDATOR.validate(results)
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
        assert growth["batch"] > 24
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
        lambda r: r["largest"]["variants"]["ours"].update(coefficients=[1, 2]),
        lambda r: r["workload"].update(method="dino"),
    ):
        broken = copy.deepcopy(results)
        change(broken)
        assert not VALIDATOR.is_valid(broken)


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(written, width, tmp_path):
    model, criterion = Encoder(), SquareLoss()
    with sk.profile.steps(model, loss=criterion, out=tmp_path) as run:
        for x in run(batches(9)):
            criterion(model(x)).backward()
    results = json.loads((tmp_path / "profile.json").read_text())
    VALIDATOR.validate(results)
    assert results["answer"].startswith("The loss takes ")
    for page, pictures in ((written[0] / "report.html", 3), (tmp_path / "report.html", 2)):
        with browser.open_page(page, width=width) as opened:
            browser.check_layout(opened)
            assert len(opened.query_selector_all("img")) == pictures
            assert len(opened.query_selector_all(".numbers dd")) == 3
            assert opened.inner_text("h1") == json.loads((page.parent / "profile.json").read_text())["answer"]


def test_reports_without_everything(written, tmp_path):
    with sk.profile.steps(nn.Linear(4, 4)) as run:
        list(run(batches(1)))
    run.report(tmp_path)
    VALIDATOR.validate(json.loads((tmp_path / "profile.json").read_text()))
    bare = copy.deepcopy(written[2])
    for case in bare["cases"]:
        if case["summary"]:
            case["summary"] |= {"timeline": None, "peak_bytes": None}
            for row in case["summary"]["parts"]:
                row["peak_bytes"] = None
    bare["largest"] = None
    assert report.render(bare).count("<img") == 1


def test_timm_names():
    timm = pytest.importorskip("timm")
    assert timm.is_model("resnet18")
    assert workload.width(workload.make_encoder("resnet18"), 32) == 512
