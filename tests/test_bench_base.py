"""``bench --base``: the verdict on times that are made up, and the whole of it on versions that are made up."""

import json
import random
import subprocess

import pytest

from selfsup_kernels.lab.bench import base, verdict


def launches(ratio, noise, bias=0.0, seed=0, turns=15, count=3):
    """Turns of (base, base, candidate): ``noise`` from turn to turn, ``bias`` from process to process."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        own = [1 + bias * draw.uniform(-1, 1) for _ in range(3)]
        own[2] *= ratio
        made.append([tuple(x * (1 + abs(draw.gauss(0, noise))) for x in own) for _ in range(turns)])
    return made


def verdicts(count=200, **arguments):
    return [verdict.judge(launches(seed=seed, **arguments))["verdict"] for seed in range(count)]


@pytest.mark.parametrize(("noise", "bias"), [(0.0, 0.0), (0.02, 0.0), (0.3, 0.0), (0.02, 0.1)])
def test_equals_are_not_flagged(noise, bias):
    assert verdicts(ratio=1.0, noise=noise, bias=bias).count("same") >= 198


@pytest.mark.parametrize(("ratio", "expected"), [(1.15, "slower"), (0.85, "faster")])
def test_differences_are_flagged(ratio, expected):
    found = verdicts(ratio=ratio, noise=0.02, bias=0.01)
    assert found.count(expected) >= 195
    assert set(found) <= {expected, "same"}


def test_small_differences_and_those_within_the_noise_are_not():
    assert verdicts(ratio=1.015, noise=0.0).count("same") == 200
    assert verdicts(ratio=1.1, noise=0.02, bias=0.2).count("slower") < 20


def test_one_disturbed_launch_is_no_verdict():
    made = launches(1.0, 0.01)
    made[1] = [(a, b, 2 * c) for a, b, c in made[1]]
    judged = verdict.judge(made)
    assert judged["verdict"] == "same"
    assert judged["ratio"] == pytest.approx(1, abs=0.02)


def test_ratio_and_noise():
    turns = [(1.0, 1.1, 2.0)] * 5
    judged = verdict.judge([turns] * 3)
    assert judged["ratio"] == pytest.approx(2 / 1.1**0.5)
    assert judged["noise"] == pytest.approx(0.1)
    assert judged["verdict"] == "slower"


PACKAGE = """
import time
now = 0.0
time.perf_counter = lambda: now  # a call takes what it says, and nothing else takes any time

def info_nce_loss(views, temperature, impl):
    global now
    if views.shape[1] == 13:
        raise ValueError("thirteen")
    now += {seconds}
    return (views**2).mean()
class backends:
    @staticmethod
    def select(impl, tensor):
        return "made up"
"""


def repository(folder, *versions):
    """A git repository whose commits hold packages of which a call takes ``versions`` seconds."""
    (folder / "selfsup_kernels").mkdir(parents=True)
    (folder / "setup.py").write_text("import sys; assert 'build_ext' in sys.argv\n")

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    for seconds in versions:
        (folder / "selfsup_kernels" / "__init__.py").write_text(PACKAGE.format(seconds=seconds))
        git("add", "-A")
        git("commit", "-m", f"takes {seconds} s")
    return folder


@pytest.fixture
def cases():
    from selfsup_kernels.lab.bench import workloads

    return [workloads.case("info_nce", batch=8, dim=4)]


def measure(monkeypatch, tmp_path, root, cases, **options):
    monkeypatch.setattr(base, "ROOT", root)
    monkeypatch.setattr(base, "LAUNCHES", 1)
    out = tmp_path / "out" / "compared.json"
    status = base.main(cases, "cpu", seconds=0.0, json_path=out, **options)
    return status, json.loads(out.read_text()) if out.exists() else None


def test_a_slower_commit_is_flagged(monkeypatch, tmp_path, cases, capsys):
    root = repository(tmp_path / "root", 0.002, 0.02)
    status, result = measure(monkeypatch, tmp_path, root, cases)
    assert status == 1
    assert [row["part"] for row in result["rows"]] == ["forward", "both"]
    for row in result["rows"]:
        assert row["verdict"] == "slower"
        assert row["ratio"] > 3
        assert {"base", "base again", "head"} == set(row["times"])
    assert "takes 0.002 s" in result["header"]["names"]["base"]
    assert "takes 0.02 s" in result["header"]["names"]["head"]
    assert {side["impl"] for side in result["header"]["sides"].values()} == {"made up"}
    printed = capsys.readouterr().out
    assert "2 of 2 slower" in printed
    # Built once: the second run finds the base where the first one left it.
    assert "building" in printed
    status, result = measure(monkeypatch, tmp_path, root, cases, base="HEAD", head="HEAD^")
    assert status == 0
    assert {row["verdict"] for row in result["rows"]} == {"faster"}


def test_changed_files_are_compared_with_the_commit_checked_out(monkeypatch, tmp_path, cases):
    root = repository(tmp_path / "root", 0.02)
    (root / "selfsup_kernels" / "__init__.py").write_text(PACKAGE.format(seconds=0.002))
    status, result = measure(monkeypatch, tmp_path, root, cases)
    assert status == 0
    assert {row["verdict"] for row in result["rows"]} == {"faster"}
    assert result["header"]["names"]["head"].endswith("with changes")


def test_what_a_version_refuses_is_no_ratio(monkeypatch, tmp_path, cases, capsys):
    root = repository(tmp_path / "root", 0.001, 0.0011)
    cases = [type(cases[0])(batch=13, dim=4)]
    status, result = measure(monkeypatch, tmp_path, root, cases)
    assert status == 0
    assert {row["verdict"] for row in result["rows"]} == {"not measured"}
    assert result["rows"][0]["reason"] == "base: ValueError: thirteen"
    assert "ratio" not in result["rows"][0]


def test_what_cannot_be_compared_is_one_line(monkeypatch, tmp_path, cases, capsys):
    root = repository(tmp_path / "root", 0.001)
    for options, words in (
        ({"base": "no-such-ref"}, "expected a commit of this checkout, got 'no-such-ref'"),
        ({"base": "--help"}, "expected a commit"),
        ({}, "expected a commit of this checkout, got 'HEAD^'"),
    ):
        status, _ = measure(monkeypatch, tmp_path, root, cases, **options)
        error = capsys.readouterr().err
        assert status == 2
        assert words in error
        assert error.count("\n") == 1
    (root / "setup.py").write_text("raise SystemExit('no compiler today')\n")
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qam", "broken"], cwd=root, check=True
    )
    assert measure(monkeypatch, tmp_path, root, cases, base="HEAD")[0] == 2
    assert "no compiler today" in capsys.readouterr().err
    assert measure(monkeypatch, tmp_path, tmp_path / "nowhere", cases)[0] == 2
    assert "git checkout" in capsys.readouterr().err


def test_a_version_that_dies_is_one_line(monkeypatch, tmp_path, cases, capsys):
    root = repository(tmp_path / "root", 0.001)
    (root / "selfsup_kernels" / "__init__.py").write_text("raise SystemExit('dead on arrival')\n")
    assert measure(monkeypatch, tmp_path, root, cases)[0] == 2
    assert "dead on arrival" in capsys.readouterr().err
