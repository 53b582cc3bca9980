"""``python -m selfsup_kernels demo``: the whole of it once, quickly, and its parts on cases with known answers."""
# ruff: noqa: E402  (the demo's modules import what the loop below checks for)

import contextlib
import io
import json
import re
import subprocess

import numpy as np
import pytest
import torch

for _name in ("sklearn", "matplotlib", "rich", "jinja2", "psutil"):
    pytest.importorskip(_name, reason="the demo's dependencies are not installed")

from browser import check_report
from matplotlib import image

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.__main__ import main
from selfsup_kernels.core import info
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.bench import eager, suite
from selfsup_kernels.lab.demo import data, evaluate, plots, report, run, train
from selfsup_kernels.lab.pages import progress


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick demo: what it printed, its summary, its page and its picture."""
    folder = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fresh, "call", lambda target, *arguments, **_: suite.probe(*arguments))
            arguments = ["demo", "--quick", "--out", str(folder / "out"), "--figure", str(folder / "figure.png")]
            assert main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    return {
        "printed": printed.getvalue(),
        "summary": json.loads((folder / "out" / "summary.json").read_text()),
        "out": folder / "out",
        "figure": folder / "figure.png",
    }


def test_summary_has_every_number(quick):
    summary = quick["summary"]
    for name, facts in summary["agreement"].items():
        assert facts["holds"], (name, facts)
        assert 0 <= facts["checks"]["gradient_ours_eager"] < 1e-5
    assert summary["agreement"]["byol"]["checks"]["ema_ours_eager"] < 1e-6
    assert summary["data"] == {"train": 1257, "test": 540}
    assert len(summary["accuracy"]) == 5
    for cases in summary["accuracy"].values():
        assert set(cases) == set(evaluate.CASES)
        assert all(0 < value <= 1 for value in cases.values())
    # Raw pixels are known to be strong on these digits: if they are not, the evaluation is broken.
    assert summary["accuracy"]["raw pixels"]["all/knn"] > 0.96
    for name, times in summary["step_seconds"].items():
        assert set(times) == {"encoder", "loss", "optimizer"} | ({"ema"} if "BYOL" in name else set())
        assert all(value > 0 for value in times.values())
    assert [case["batch"] for case in summary["sweep"]["cases"]] == list(run.QUICK_SIZES)
    assert all(set(case["seconds"]) == {"eager", "ours"} for case in summary["sweep"]["cases"])


def test_page_pictures_and_printed_lines(quick):
    page, printed = (quick["out"] / "report.html").read_text(encoding="utf-8"), quick["printed"]
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 4
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert quick["summary"]["device"]["cpu"]["model"] in page
    for picture in (quick["figure"], quick["out"] / "loss.png"):
        assert image.imread(picture)[..., :3].std() > 0.01  # something is drawn
    expected = [
        "2 cores",
        "1/6 ",
        "First picture",
        "2/6 Train Contrastive, eager: about",
        "6/6 ",
        "Ours gives the same",
    ]
    found = [printed.index(words) for words in [*expected, "in 0 of 8 comparisons", "Report: "]]
    assert found == sorted(found)


def test_page_in_a_browser(quick):
    check_report(quick["out"] / "report.html")


@pytest.mark.parametrize("num_views", [2, 4])
def test_eager_losses_are_the_specification(num_views):
    views = torch.randn(num_views, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(eager.info_nce_loss(views, 0.3), spec.info_nce_loss(views, temperature=0.3))
    targets = torch.randn_like(views)
    torch.testing.assert_close(eager.byol_loss(views, targets), spec.byol_loss(views, targets))


@pytest.mark.parametrize("part", ["value", "gradient", "byol", "ema"])
def test_a_wrong_kernel_is_noticed(part, monkeypatch):
    """The check fails where ours is off by a thousandth, in any of the things it compares."""
    right_loss, right_byol = sk.info_nce_loss, sk.byol_loss

    def wrong_loss(views, **options):
        value = right_loss(views, **options)
        return value * 1.001 if part == "value" else value + 0.001 * (views - views.detach()).sum()

    name = "contrastive" if part in ("value", "gradient") else "byol"
    if name == "contrastive":
        monkeypatch.setattr(train.sk, "info_nce_loss", wrong_loss)
    elif part == "byol":
        monkeypatch.setattr(train.sk, "byol_loss", lambda p, t: right_byol(p, t) * 1.001)
    else:
        update = sk.methods.BYOL.update_target
        monkeypatch.setattr(sk.methods.BYOL, "update_target", lambda self, momentum: update(self, momentum * 0.99))
    recipe = train.Recipe(views=2, steps=3, learning_rate=1e-3, batch=16)
    images = torch.rand(32, 1, 8, 8)
    done = train.train(name, "ours", images, recipe, 0, check_every=1)
    assert not train.agrees(done.checks)
    monkeypatch.undo()
    done = train.train(name, "ours", images, recipe, 0, check_every=1)
    assert train.agrees(done.checks)


def test_nan_is_no_agreement():
    checks = {}
    for value in (1e-8, float("nan"), 1e-8):
        train.worst(checks, "loss_ours_eager", torch.tensor(1 + value), torch.tensor(1.0))
    assert not train.agrees(checks)
    assert not train.agrees({})


def test_batches_follow_the_seed_and_the_split_keeps_the_test_digits_apart():
    images = torch.rand(20, 1, 8, 8)
    first, again, other = (list(data.batches(images, 8, 2, 4, seed)) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert len(a) == 2
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0], c[0])
        assert not torch.equal(a[0], a[1])
    digits = data.load_digits()
    assert torch.equal(digits.test, data.load_digits().test)
    train_rows = {row.numpy().tobytes() for row in digits.train}
    assert sum(row.numpy().tobytes() in train_rows for row in digits.test) == 0
    assert digits.test_labels.bincount().min() >= 50


@pytest.mark.parametrize(
    ("error", "reason"), [(fresh.OutOfMemory("x"), "memory"), (subprocess.TimeoutExpired("x", 1), "time")]
)
def test_sweep_leaves_out_what_does_not_fit(monkeypatch, error, reason):
    def call(target, parameters, name, **options):
        if name == "eager":
            raise error
        return {"peak_bytes": 1000, "seconds": 0.5}

    monkeypatch.setattr(fresh, "call", call)
    row = run.measure(16)
    assert row["left_out"] == {"eager": reason}
    assert (row["seconds"], row["peak_bytes"]) == ({"ours": 0.5}, {"ours": 1000})
    assert report.sweep_row(row) == ["16", f"left out ({reason})", "500", "", "< 1 MB"]
    for _, draw in plots.sweep([row]):
        (axis,) = plots.drawn([draw]).axes
        assert [text.get_text() for text in axis.texts] == ["ours"]


def test_answer_and_notes_say_what_is_worse(quick):
    summary = json.loads(json.dumps(quick["summary"]))
    assert "as fast" not in report.answer(summary)  # of a quick run
    summary["auto"], summary["build"], summary["quick"] = "reference", "the command", False
    summary["agreement"]["byol"]["holds"] = False
    for case in summary["sweep"]["cases"]:
        case["seconds"] = {"eager": 1.0, "ours": 2.0}
    summary["ours_minus_eager"]["BYOL"]["all/knn"]["significant"] = True
    text = "\n".join([report.answer(summary), *report.notes(summary), report.verdict(summary)])
    for words in (
        "is 0.5x as fast",
        "in 1 of 8 comparisons",
        "does NOT agree with eager to rounding (BYOL)",
        "SLOWER than eager at batch 64, 128",
        "the command",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("lost", "won", "significant"), [(0, 0, False), (7, 0, False), (8, 0, True), (0, 8, True), (40, 30, False)]
)
def test_significant_differences_of_features(lost, won, significant):
    """Where ours loses and wins so many of 540 digits; 5 % over eight comparisons is 2.73 standard errors."""
    eager = np.repeat([0.0, 1.0], 270)
    ours = eager.copy()
    ours[:won], ours[540 - lost :] = 1.0, 0.0
    found = evaluate.differences({"case": ours}, {"case": eager}, 8)["case"]
    assert found["significant"] is significant
    assert found["difference"] == pytest.approx((won - lost) / 540)


def test_missing_dependencies_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(info, "_is_installed", lambda name: name not in ("sklearn", "rich"))
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install scikit-learn rich" in error


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Progress(stream) as bar:
        bar.stage("Train", 2)
        bar.advance("loss 1.5")
        bar.advance("loss 1.25")
    assert "Train" in stream.getvalue()
    assert "100%" in stream.getvalue()


def test_lines_of_progress_in_a_file(monkeypatch):
    """Each quarter of the steps has one, and each step after half a minute without any."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress.Progress(stream) as bar:
        bar.stage("Train", 8)
        for seconds in (1, 2, 40, 41, 42):
            now[0] = seconds
            bar.advance()
    assert stream.getvalue().splitlines() == ["[    2 s] Train  2/8", "[   40 s] Train  3/8", "[   41 s] Train  4/8"]
