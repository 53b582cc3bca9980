"""``bench --base``: the verdict on times that are made up, and the whole of it on versions that are made up."""

import json
import subprocess

import pytest

from selfsup_kernels.lab.bench import base, workloads

STEADY = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05]


@pytest.mark.parametrize(
    ("head", "ratio", "verdict"),
    [
        ([2 * t for t in STEADY], 2.0, "slower"),
        ([*STEADY[1:], 9.0], 1.035 / 1.025, "same"),  # they overlap
        ([*(2 * t for t in STEADY[1:]), 0.1], None, "slower"),  # one that something disturbed
        ([t / 2 for t in STEADY], 0.5, "faster"),
        ([1.01 * t for t in STEADY], 1.01, "same"),  # too little to matter
    ],
)
def test_verdict(head, ratio, verdict):
    judged = base.judge(STEADY, head)
    assert judged["verdict"] == verdict
    assert ratio is None or judged["ratio"] == pytest.approx(ratio)
    assert judged["times"]["base"]["p50_ms"] == pytest.approx(1.025)


PACKAGE = """
import time

def info_nce_loss(views, temperature, objective, impl):
    if views.shape[1] == 13:
        raise ValueError("thirteen")
    time.sleep({seconds})
    return (views**2).mean()
class backends:
    @staticmethod
    def select(impl, tensor):
        return "made up"
"""


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a function that makes a git repository whose commits hold packages of which a call takes so many seconds;
    it stands in for this checkout."""

    def make(*versions):
        folder = tmp_path / "root"
        (folder / "selfsup_kernels").mkdir(parents=True)
        (folder / "setup.py").write_text("import sys; assert 'build_ext' in sys.argv\n")
        git(folder, "init")
        for seconds in versions:
            (folder / "selfsup_kernels" / "__init__.py").write_text(PACKAGE.format(seconds=seconds))
            git(folder, "add", "-A")
            git(folder, "commit", "-m", f"takes {seconds} s")
        monkeypatch.setattr(base, "ROOT", folder)
        return folder

    monkeypatch.setattr(base, "LAUNCHES", 1)
    return make


def measure(tmp_path, batches=(8,), **options):
    out = tmp_path / "out" / "compared.json"
    cases = [workloads.case("info_nce", batch=batch, dim=4) for batch in batches]
    status = base.main(cases, "cpu", seconds=0.0, json_path=out, **options)
    return status, json.loads(out.read_text()) if out.exists() else None


def test_a_slower_commit_is_flagged_and_what_a_version_refuses_is_no_ratio(repository, tmp_path, capsys):
    root = repository(0.002, 0.05)
    status, result = measure(tmp_path, (8, 13))
    assert status == 1
    slower, refused = result["rows"][:2], result["rows"][2:]
    assert [row["part"] for row in slower] == [row["part"] for row in refused] == ["forward", "both"]
    for row in slower:
        assert row["verdict"] == "slower"
        assert row["ratio"] > 3
        assert {"base", "head"} == set(row["times"])
    for row in refused:
        assert (row["verdict"], row["reason"]) == ("not measured", "base: ValueError: thirteen")
        assert "ratio" not in row
    assert "takes 0.002 s" in result["header"]["names"]["base"]
    assert "takes 0.05 s" in result["header"]["names"]["head"]
    assert {side["impl"] for side in result["header"]["sides"].values()} == {"made up"}
    printed = capsys.readouterr().out
    assert "2 of 4 slower" in printed
    assert "building" in printed
    # A change that is not committed is compared with the commit that is checked out.
    (root / "selfsup_kernels" / "__init__.py").write_text(PACKAGE.format(seconds=0.002))
    status, result = measure(tmp_path)
    assert status == 0
    assert {row["verdict"] for row in result["rows"]} == {"faster"}
    assert result["header"]["names"]["head"].endswith("with changes")


def test_the_commit_of_a_measurement(repository, tmp_path, monkeypatch):
    root = repository(0.001)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True).stdout
    assert head.startswith(base.measured_commit())
    (root / "notes.txt").write_text("no code")
    assert head.startswith(base.measured_commit())
    (root / "setup.py").write_text("")
    assert base.measured_commit().endswith(" with changes")
    monkeypatch.setattr(base, "ROOT", tmp_path / "installed")
    assert base.measured_commit() is None


def test_what_cannot_be_compared_is_one_line(repository, tmp_path, capsys, monkeypatch):
    root = repository(0.001)

    def refused(words, **options):
        assert measure(tmp_path, **options)[0] == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line

    refused("expected a commit of this checkout, got 'no-such-ref'", base="no-such-ref")
    refused("expected a commit", base="--help")
    refused("expected a commit of this checkout, got 'HEAD^'")
    (root / "selfsup_kernels" / "__init__.py").write_text("raise SystemExit('dead on arrival')\n")
    refused("dead on arrival")
    (root / "setup.py").write_text("raise SystemExit('no compiler today')\n")
    git(root, "commit", "-qam", "broken")
    refused("no compiler today", base="HEAD")
    monkeypatch.setattr(base, "ROOT", tmp_path / "nowhere")
    refused("git checkout")
