"""python -m selfsup_kernels profile: what it trains, what it says, what it writes, and whether its advice is right."""

import copy
import importlib
import importlib.util
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
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.profile import cli, findings, largest, limit, parts, plots, report, story, workload
from selfsup_kernels.lab.profile.cli import METHODS
from selfsup_kernels.lab.profile.workload import Workload

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(sk.__file__).parent / "lab" / "profile" / "profile.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def here(target, *arguments, **options):
    """``fresh.call`` without another process."""
    module, function = target.split(":")
    return json.loads(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_eager_is_the_same_training(method, views):
    """The comparison is between two ways to the same numbers: loss, gradients and targets over three steps."""
    states = {}
    for variant in workload.VARIANTS:
        work = Workload(method, variant, batch=12, views=views, image_size=8, dim=16, accumulate=2)
        if method == "moco" and views == 3:
            work = work.of(batch=16)
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
        if name != "queue_ptr" and value.is_floating_point():
            torch.testing.assert_close(
                value, states["eager"][1][name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"amp": "fp16"}, {"encoder": "profile_cases:tiny"}])
def test_variants_of_the_training(options):
    trainer = workload.Trainer(Workload(batch=8, **options))
    before = copy.deepcopy(trainer.method.state_dict())
    for views in workload.loader(trainer.work, 2):
        assert [tuple(v.shape) for v in views] == [(8, 3, 16, 16)] * 2
        assert not torch.equal(*views)
        trainer.batch(views)
    assert any(
        not torch.equal(a, b) for a, b in zip(before.values(), trainer.method.state_dict().values(), strict=True)
    )


def test_fit_recovers_what_it_was_made_of():
    sizes = [100, 200, 400, 800]
    for coefficients in ((3e8, 2e5, 70.0), (3e8, 2e5, 0.0), (0.0, 0.0, 5.0), (1e6, 0.0, 0.0)):
        found = largest.fit(sizes, [largest.value(coefficients, b) for b in sizes])
        assert found == pytest.approx(coefficients, rel=1e-6, abs=1e-3)
    a, b, c = largest.fit(sizes, [5.0, 4.0, 3.0, 2.0])  # memory that shrinks: no negative growth is believed
    assert (b, c) == (0, 0)
    assert a == pytest.approx(3.5)
    assert largest.fit([10, 20], [100.0, 200.0]) == pytest.approx((0, 10, 0), abs=1e-6)


@pytest.mark.parametrize(
    ("sizes", "values"),
    [([100], [1.0]), ([100, 100], [1.0, 2.0]), ([1, 2], [1.0]), ([1, 2], [1.0, float("nan")]), ([1, 2], [-1.0, 2.0])],
)
def test_fit_refuses_nonsense(sizes, values):
    with pytest.raises(ValueError, match="expected"):
        largest.fit(sizes, values)


def test_solve():
    for coefficients in ((3e8, 2e5, 70.0), (3e8, 2e5, 0.0), (0.0, 0.0, 5.0), (3e8, 2e5, 1e-9)):
        for multiple in (1, 4):
            batch = largest.solve(coefficients, 2e9, multiple)
            assert batch % multiple == 0
            assert largest.value(coefficients, batch) <= 2e9 * (1 + 1e-9)
            assert largest.value(coefficients, batch + multiple) > 2e9
    assert largest.solve((3e9, 1.0, 0.0), 2e9) == 0
    assert largest.solve((1.0, 0.0, 0.0), 2e9) == largest.LIMIT


def invented(coefficients, bound):
    """A measurement of memory that grows by the coefficients and is refused above the bound."""

    def call(target, work, steps=3, memory_limit=None):
        peak = largest.value(coefficients(work["batch"]), work["batch"])
        if peak > bound:
            raise fresh.OutOfMemory("refused")
        return {"batch": work["batch"], "peak_bytes": round(peak), "seconds": 1e-4 * work["batch"]}

    return call


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [
        ("linear", lambda batch: (3e8, 4e4, 0.0)),
        ("quadratic", lambda batch: (3e8, 4e4, 60.0)),
        # Small batches have their peak in the encoder, large ones in the loss.
        ("two regimes", lambda batch: (3e8, 2e5, 0.0) if batch < 1500 else (3e8, 2e4, 120.0)),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_search_finds_the_largest_batch(monkeypatch, name, coefficients, accumulate):
    bound = 2_000_000_000
    monkeypatch.setattr(fresh, "call", invented(coefficients, bound))
    growth = largest.measure(Workload(accumulate=accumulate), bound, 256, 1e9)
    truth = max(b for b in range(accumulate, 60_000, accumulate) if largest.value(coefficients(b), b) <= bound)
    assert growth.largest % accumulate == 0
    assert growth.largest == pytest.approx(truth, rel=0.02)


def test_search_where_nothing_fits_or_time_is_short(monkeypatch):
    monkeypatch.setattr(fresh, "call", invented(lambda batch: (3e9, 1.0, 0.0), 2e9))
    growth = largest.measure(Workload(), int(2e9), 256, 1e9)
    assert growth.largest == 0
    assert growth.json()["points"] == []
    monkeypatch.setattr(fresh, "call", invented(lambda batch: (3e8, 4e4, 0.0), 2e12))
    growth = largest.measure(Workload(), int(2e12), 256, 0.0)
    assert len(growth.points) <= 2
    assert growth.largest > 100 * growth.points[-1]["batch"]
    told = growth.json()
    assert (told["batch"], told["or_more"]) == (8 * growth.points[-1]["batch"], True)  # and not millions, unseen
    assert findings.batch_words(told) == f"{told['batch']:,} or more"


def test_where_the_system_tells_no_peak_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(fresh, "call", lambda *_, **__: pytest.fail("a process for nothing"))
    monkeypatch.setattr(limit._memory, "status", lambda name: None)
    growth = largest.measure(Workload(), int(2e9), 256, 1e9)
    assert (growth.largest, growth.json()["batch"], growth.peak(256)) == (None, None, None)


def test_private_memory_of_a_known_allocation():
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell a process its private memory")
    before = limit.private()
    with limit.Peak("cpu") as peak:
        block = torch.ones(256 << 20, dtype=torch.uint8)
        del block
    assert 0.98 * 2**28 < peak.bytes - before < 1.1 * 2**28


@pytest.mark.parametrize("variant", ["eager", "ours"])
def test_advice_on_the_largest_batch_is_right_within_a_tenth(variant, monkeypatch):
    """Real steps in fresh processes, under a real limit of their private memory, by bisection."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system limits no process's private memory")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # Threads that wait for each other's lock get heaps of their own: how many depends on how busy the machine is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    bound = {"eager": 700_000_000, "ours": 500_000_000}[variant]
    # Small images, so that the eager loss' matrices are what grows; larger ones where images are all there is.
    size = {"eager": 8, "ours": 32}[variant]
    work = Workload(variant=variant, encoder="profile_cases:tiny", dim=32, image_size=size)
    advice = largest.measure(work, bound, 512, 1e9).largest  # twelve batches, however slow
    low, high = int(advice / 1.15), int(advice * 1.15)
    assert largest.survives(work.of(batch=low), bound)
    assert not largest.survives(work.of(batch=high), bound)
    while high > 1.06 * low:
        middle = (low + high) // 2
        if largest.survives(work.of(batch=middle), bound):
            low = middle
        else:
            high = middle
    assert low / 1.1 < advice < 1.1 * high, (low, high)
    assert abs(advice - (low + high) / 2) < 0.1 * (low + high) / 2


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
        (["--amp", "int8"], "--amp: expected bf16 or fp16, got 'int8'"),
        (["--memory", "lots"], "--memory: expected an amount of memory such as 8GB"),
        (["--memory", "8 parsec"], "--memory: expected an amount of memory"),
        (["--seconds", "-3"], "--seconds: expected a number > 0, got '-3'"),
        (["--device", "quantum"], "--device: expected one of cpu"),
        (["--device", "cuda:77"], "--device: expected one of cpu"),
        (["--out", "/proc/none"], "--out: expected a folder that can be written, got '/proc/none'"),
        (["--out", __file__], "--out: expected a folder that can be written"),
        (["--encoder", "nosuchmodule:f"], "--encoder: expected MODULE:CALLABLE that can be imported"),
        (["--encoder", "math:pi"], "--encoder: expected"),
        (
            ["--encoder", "profile_cases:wrong"],
            "--encoder: expected (2, features) for (2, 3, 16, 16), got (2, 3, 16, 16)",
        ),
        (["--encoder", "profile_cases:raises"], "which says RuntimeError"),
        (["--encoder", "torch:zeros_like"], "--encoder: expected a network"),
        (["--encoder", "no-such-net"], "--encoder: expected convnet"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, words):
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("profile: --")
    assert error.count("\n") == 1
    assert words in error


def test_amounts_and_default_batches():
    assert [cli.amount("memory", t) for t in ("8GB", "500 MiB", "1.5tb", "123")] == [
        8 * 10**9,
        500 << 20,
        15 * 10**11,
        123,
    ]
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
def command(tmp_path_factory):
    """The whole command on a tiny case, its fresh processes replaced by this one, eager out of memory at one batch."""
    out = tmp_path_factory.mktemp("profile")

    def call(target, work, *arguments, **options):
        if target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 24:
            raise fresh.OutOfMemory("out of memory")
        if target.endswith("profiled") and work["variant"] == "eager" and work["batch"] == 12:
            raise fresh.Failed("first line\nValueError: last line")
        return here(target, work, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "call", call)
        patch.setattr(story, "GROWTH", 6e-8)  # no batch is left out for lack of time, and none is looked for
        arguments = [
            "--method",
            "fusion",
            "--batch",
            "8,12,24",
            "--accumulate",
            "2",
            "--dim",
            "16",
            "--seconds",
            "100000000",
        ]
        status = main(["profile", *arguments, "--steps", "2", "--memory", "30GB", "--out", str(out)])
    return out, status, json.loads((out / "profile.json").read_text())


def test_command_end_to_end(command, capsys):
    out, status, results = command
    assert status == 0
    VALIDATOR.validate(results)
    told = {(case["batch"], case["variant"]): case for case in results["cases"]}
    assert told[24, "eager"]["status"] == "out of memory"
    assert told[12, "eager"]["status"] == "failed"
    assert told[12, "eager"]["reason"] == "ValueError: last line"
    measured = [case for case in results["cases"] if case["status"] == "measured"]
    assert [(case["batch"], case["variant"]) for case in measured] == [
        (8, "ours"),
        (8, "eager"),
        (12, "ours"),
        (24, "ours"),
    ]
    for case in measured:
        s = case["summary"]
        spent = {row["part"]: row["seconds"] for row in s["parts"]}
        assert all(spent[part] > 0 for part in parts.PARTS)
        assert sum(spent.values()) == pytest.approx(s["marked_step_seconds"])
        assert s["named_seconds"] == pytest.approx(sum(spent[p] for p in parts.NAMED))
        events = json.loads((out / case["trace"]).read_text())["traceEvents"]
        assert "selfsup_kernels: EMA" in {event["name"] for event in events}
    share = next(c for c in measured if c["batch"] == 24)["summary"]["loss_share"]
    assert results["answer"].startswith("At batch 24 the loss takes ")
    assert results["answer"].endswith("of the step; eager is out of memory.")
    assert f"{100 * share:.0f}" in results["answer"] or f"{100 * share:.1f}" in results["answer"]
    for growth in results["largest"]["variants"].values():
        assert growth["batch"] % 2 == 0
        assert growth["batch"] > 24
    page = (out / "report.html").read_text()
    assert page.index(results["answer"]) < page.index("<h2>")
    assert "http" not in page.replace("http://www.w3.org", "")


def test_schema_refuses_what_is_broken(command):
    _, _, results = command
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
    assert VALIDATOR.is_valid(results)


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(command, width, tmp_path):
    out, _, _ = command
    model, criterion = Encoder(), SquareLoss()
    with sk.profile.steps(model, loss=criterion, out=tmp_path) as run:
        for x in run(batches(9)):
            criterion(model(x)).backward()
    VALIDATOR.validate(json.loads((tmp_path / "profile.json").read_text()))
    for page, pictures in ((out / "report.html", 4), (tmp_path / "report.html", 3)):
        with browser.open_page(page, width=width) as opened:
            browser.check_layout(opened)
            assert len(opened.query_selector_all("img")) == pictures
            assert opened.inner_text("h1") == json.loads((page.parent / "profile.json").read_text())["answer"]


def test_report_of_a_loop_that_was_too_short(tmp_path):
    model = nn.Linear(4, 4)
    with sk.profile.steps(model) as run:
        for _ in run(batches(1)):
            pass
    run.report(tmp_path)
    results = json.loads((tmp_path / "profile.json").read_text())
    VALIDATOR.validate(results)
    assert results["answer"] == "No step was measured in which the loss was found."


def made(loss, rest, peak, status="measured", **more):
    """A case whose loss and encoder take these seconds."""
    spent = dict.fromkeys(parts.PARTS, 0.0) | {parts.LOSS_FORWARD: loss, parts.ENCODER_FORWARD: rest}
    step = loss + rest
    summary = {
        "loss_share": loss / step,
        "marked_step_seconds": step,
        "step_seconds": step,
        "peak_bytes": peak,
        "warnings": [],
        "parts": [{"part": p, "seconds": s, "share": s / step} for p, s in spent.items()],
    }
    case = {"batch": 8192, "status": status, "reason": None, "summary": summary if status == "measured" else None}
    return case | more


@pytest.mark.parametrize(
    ("ours", "eager", "answer"),
    [
        (
            made(0.03, 0.97, 2e9),
            made(0.41, 0.59, 14e9),
            "At batch 8,192 the loss takes 3.0 % of the step; eager would take 41 % and 12 GB more.",
        ),
        (
            made(0.01, 0.99, 2e9),
            made(0.03, 0.97, 2.01e9),
            "At batch 8,192 the loss takes 1.0 % of the step, eager's 3.0 % and as much memory:"
            " a faster loss gains at most 3.0 %.",
        ),
        (
            made(0.5, 0.5, 3e9),
            made(0.3, 0.7, 2e9),
            "At batch 8,192 the loss takes 50 % of the step; eager takes 30 % and 1 GB less: ours is no faster.",
        ),
        (
            made(0.03, 0.97, 2e9),
            made(1, 1, 1, status="does not fit", reason="would take about 14 GB of 8 GB"),
            "At batch 8,192 the loss takes 3.0 % of the step; eager would take about 14 GB of 8 GB.",
        ),
        (
            made(1, 1, 1, status="failed", reason="ValueError: no"),
            made(0.3, 0.7, 2e9),
            "At batch 8,192 eager's loss takes 30 % of the step; ours: ValueError: no.",
        ),
    ],
)
def test_the_answer_speaks_against_us_too(ours, eager, answer):
    cases = [ours | {"variant": "ours"}, eager | {"variant": "eager"}]
    assert findings.answer({"cases": cases, "largest": None}) == answer


def test_the_answer_is_about_a_batch_that_both_were_tried_at():
    late = made(0.5, 0.5, 1e9) | {"variant": "ours", "batch": 9000}
    left_out = made(1, 1, 1, status="skipped", reason="was left out") | {"variant": "eager", "batch": 9000}
    both = [made(0.2, 0.8, 1e9) | {"variant": v, "batch": 100} for v in ("ours", "eager")]
    results = {"cases": [*both, late, left_out], "largest": None}
    assert findings.answer(results).startswith("At batch 100 ")
    assert "Eager at batch 9,000 was left out." in findings.findings(results)
    assert findings.answer({"cases": [late, left_out], "largest": None}).endswith("; eager was left out.")


def test_the_answer_for_a_users_own_loop():
    case = made(0.01, 0.09, 1e9) | {"variant": "yours", "batch": None}
    answer = findings.answer({"cases": [case], "largest": None})
    assert answer == "The loss takes 10 % of the step (10 of 100 ms): a faster loss gains at most 10 %."


def test_pictures_and_tables_without_everything(command):
    _, _, results = command
    bare = copy.deepcopy(results)
    for case in bare["cases"]:
        if case["summary"]:
            case["summary"] |= {"timeline": None, "peak_bytes": None}
            for row in case["summary"]["parts"]:
                row["peak_bytes"] = None
    bare["largest"] = None
    assert report.render(bare).count("<img") == 1
    assert plots.growth(results["largest"]).axes
    assert len(list(report.rows(bare))) == len(bare["cases"])


def test_timm_names():
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ValueError, match=r"encoder: .*pip install timm"):
            workload.make_encoder("resnet18")
        return
    assert workload.width(workload.make_encoder("resnet18"), 32) == 512
