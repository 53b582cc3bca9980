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
        Step("good", python("print('all fine'); raise SystemExit(5)"), 2000, fine=(0, 5)),
        Step("bad", python("print('the reason'); raise SystemExit(3)"), 2000),
        Step("absent", ["no such command"], 2000, skip="it is not on PATH"),
        Step("missing", ["./no-such-command"], 2000),
        Step("figures", lambda limit: python(f"print('one\\ntwo\\n{limit < 2000}')"), 1500, show=2),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10_000)
    states = ["ok", "FAILED", "skipped", "FAILED", "ok"]
    assert [o.state for o in outcomes] == states
    assert gpu_check.report(outcomes[:1], steps[:1], tmp_path) == 0
    capsys.readouterr()
    assert gpu_check.report(outcomes, steps, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "the reason" in printed
    assert "two\nTrue" in printed
    assert "one\n" not in printed
    table = printed[printed.rindex("\nstep ") + 1 :].splitlines()
    assert [line.split()[0] for line in table[:6]] == ["step", *(step.name for step in steps)]
    assert "exit status 3" in table[2]
    assert "it is not on PATH" in table[3]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "all fine" in log
    assert "the reason" in log
    assert [step["state"] for step in json.loads((tmp_path / "gpu_check.json").read_text())] == states


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
    steps = [
        Step("slow", python("import time; time.sleep(1e6)  # forever"), 60, reserve=8),
        Step("quick", python("print('done')"), 60),
        Step("nothing left", python("pass"), 60, reserve=100),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10)
    assert [o.state for o in outcomes] == ["FAILED", "ok", "FAILED"]
    assert waited == [2.0, gpu_check.GRACE]
    assert outcomes[2].note == "no time was left"


def test_some_steps_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = gpu_check.all_steps(tmp_path, 90)

    def left(only=(), skip=()):
        chosen = gpu_check.choose(steps, only, skip)
        assert [s.name for s in chosen] == [s.name for s in steps]
        return [s.name for s in chosen if not s.skip]

    assert left() == [s.name for s in steps]
    assert left(only=["memcheck", "race"]) == ["memcheck", "racecheck"]
    assert left(only=["check"], skip=["race"]) == ["memcheck", "initcheck"]
    assert left(skip=["build"]) == [s.name for s in steps[1:]]
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "no such step"])
    assert "no step has 'no such step' in its name; there are: build, every" in capsys.readouterr().err
    commands = {step.name: step.command for step in steps}
    measured = commands["benchmarks"](345)
    assert measured[measured.index("--minutes") + 1] == "5.0"
    assert "--initcheck" in commands["initcheck"]
    assert "--initcheck" not in commands["memcheck"]


def test_processes_fit_the_cores_and_the_memory():
    assert [gpu_check.workers(n << 30, c) for n, c in ((139, 16), (139, 64), (8, 16), (1, None))] == [16, 16, 4, 1]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
