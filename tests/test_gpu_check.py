"""The command that checks everything on a GPU, with steps that need none: limits, failures, the table at the end."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import benchmarks_script

gpu_check = benchmarks_script("gpu_check")
Step = gpu_check.Step


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_a_failure_hides_no_later_step(tmp_path, capsys):
    steps = [
        Step("good", python("print('all fine')"), 2000),
        Step("bad", python("print('the reason'); raise SystemExit(3)"), 2000),
        Step("absent", ["no such command"], 2000, skip="it is not on PATH"),
        Step("figures", lambda limit: python(f"print('one\\ntwo\\n{limit < 2000}')"), 1500, show=2),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10_000)
    assert [(o.name, o.state) for o in outcomes] == [
        ("good", "ok"),
        ("bad", "FAILED"),
        ("absent", "skipped"),
        ("figures", "ok"),
    ]
    capsys.readouterr()
    assert gpu_check.report(outcomes, steps, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "the reason" in printed
    assert "two\nTrue" in printed
    assert "one\n" not in printed
    table = printed[printed.index("step ") :].splitlines()
    assert [line.split()[0] for line in table[:5]] == ["step", "good", "bad", "absent", "figures"]
    assert "exit status 3" in table[2]
    assert "it is not on PATH" in table[3]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "all fine" in log
    assert "the reason" in log
    assert "skipped, it is not on PATH" in log
    assert [step["state"] for step in json.loads((tmp_path / "gpu_check.json").read_text())] == [
        "ok",
        "FAILED",
        "skipped",
        "ok",
    ]


def test_all_good_is_status_zero(tmp_path, capsys):
    steps = [Step("good", python("raise SystemExit(5)"), 2000, fine=(0, 5))]
    assert gpu_check.report(gpu_check.run_steps(steps, tmp_path, 10_000), steps, tmp_path) == 0


LIMIT = 77
"""Seconds that no step waits for: `limit_at` says when they are over."""


@pytest.fixture
def limit_at(tmp_path, monkeypatch):
    """A file. A step whose limit is ``LIMIT`` is at it once the file is there, be that early or late."""
    reached, wait = tmp_path / "reached", subprocess.Popen.wait

    def until(process, timeout=None):
        if timeout != LIMIT:
            return wait(process, timeout)
        while not reached.exists():
            assert process.poll() is None, "the step ended before its limit"
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until)
    return reached


def test_a_step_is_killed_with_its_children(tmp_path, monkeypatch, limit_at):
    """The child's lock on a file is free when it is gone. A child that lives says so before it gives the lock up."""
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    locked = tmp_path / "locked"
    child = (
        f"import fcntl, time; file = open({str(locked)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        f"open({str(limit_at)!r}, 'w').close(); time.sleep(60); print('alive', file=file, flush=True)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    )
    (outcome,) = gpu_check.run_steps([Step("slow", python(parent), LIMIT)], tmp_path, 100)
    assert (outcome.state, outcome.note) == ("FAILED", f"killed after {LIMIT} s")
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert file.read() == ""


@pytest.fixture
def in_the_background():
    """A process that a shell script has started with ``&`` ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
def test_what_had_failed_before_the_limit_is_seen(tmp_path, monkeypatch, limit_at):
    """As pytest prints it: a step is interrupted before it is killed."""
    monkeypatch.setattr(gpu_check, "GRACE", 1000)  # pytest ends as soon as it has printed
    test = tmp_path / "test_slow.py"
    test.write_text(
        "import time\ndef test_bad(): assert 2 == 3, 'the reason'\n"
        f"def test_slow():\n    open({str(limit_at)!r}, 'w').close()\n    time.sleep(10_000)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, str(test)]
    (outcome,) = gpu_check.run_steps([Step("tests", command, LIMIT)], tmp_path, 100)
    assert (outcome.state, outcome.note) == ("FAILED", f"killed after {LIMIT} s")
    assert any("the reason" in line for line in outcome.tail)


def test_later_steps_keep_the_time_that_is_reserved_for_them(tmp_path, monkeypatch):
    """By a clock that only waiting for the slow step moves."""
    now, wait, waited = [0.0], subprocess.Popen.wait, []

    def counted(process, timeout=None):
        if "forever" not in process.args[-1] or timeout is None:
            return wait(process)
        waited.append(timeout)
        now[0] += timeout
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", counted)
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(gpu_check, "GRACE", 5.0)
    steps = [
        Step("slow", python("import time; time.sleep(1e6)  # forever"), 60, reserve=8),
        Step("quick", python("print('done')"), 60),
        Step("nothing left", python("pass"), 60, reserve=100),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10)
    assert [o.state for o in outcomes] == ["FAILED", "ok", "FAILED"]
    assert waited == [2.0, 5.0]
    assert outcomes[2].note == "no time was left"


def test_a_command_that_does_not_exist_is_a_failed_step(tmp_path):
    steps = [Step("missing", ["./no-such-command"], 5), Step("good", python("pass"), 20)]
    assert [o.state for o in gpu_check.run_steps(steps, tmp_path, 60)] == ["FAILED", "ok"]


def test_the_steps_fit_the_time(tmp_path):
    steps = gpu_check.all_steps(tmp_path, 90)
    assert gpu_check.MINUTES < 9
    assert all(step.limit < 60 * gpu_check.MINUTES for step in steps)
    assert {"build", "tests of the kernels", "memcheck", "racecheck", "predictions", "benchmarks"} <= {
        s.name for s in steps
    }
    (benchmarks,) = (s for s in steps if s.name == "benchmarks")
    command = benchmarks.command(345)
    assert command[command.index("--minutes") + 1] == "5.0"
    # What needs no GPU comes last, and whatever the first steps take, the benchmarks have time.
    assert [s.name for s in steps[-2:]] == ["machine code of CUDA C++", "predictions"]
    assert all(s.reserve >= 100 for s in steps[: steps.index(benchmarks)])


def test_some_steps_alone(tmp_path):
    steps = gpu_check.all_steps(tmp_path, 90)

    def left(**texts):
        chosen = gpu_check.choose(steps, texts.get("only", []), texts.get("skip", []))
        assert [s.name for s in chosen] == [s.name for s in steps]
        return [s.name for s in chosen if s.skip != "not asked for"]

    assert left() == [s.name for s in steps]
    assert left(only=["memcheck", "race"]) == ["memcheck", "racecheck"]
    assert left(only=["check"], skip=["race"]) == ["memcheck", "initcheck"]
    assert left(skip=["build"]) == [s.name for s in steps[1:]]
    with pytest.raises(ValueError, match="'nothing' in its name; there are: build, every op once"):
        left(skip=["nothing"])


def test_an_unknown_step_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "no such step"])
    assert "no step has 'no such step' in its name" in capsys.readouterr().err


def test_processes_fit_the_processors_and_the_memory():
    gib = 1 << 30
    assert gpu_check.workers(139 * gib, 16) == 16
    assert gpu_check.workers(139 * gib, 64) == 16
    assert gpu_check.workers(8 * gib, 16) == 4
    assert gpu_check.workers(1 * gib, None) == 1


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_initcheck_leaves_out_what_reads_unwritten_memory_on_purpose(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    commands = {step.name: step.command for step in gpu_check.all_steps(tmp_path, 90)}
    assert "--initcheck" in commands["initcheck"]
    assert "--initcheck" not in commands["memcheck"]
