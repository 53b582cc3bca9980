"""The command that checks everything on a GPU, with steps that need none: limits, failures, the table at the end."""

import fcntl
import json
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
        Step("figures", python("print('one\\ntwo\\nthree')"), 1500, show=2),
    ]
    steps += [Step("late", ["true"], 2000, reserve=20_000)]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10_000)
    states = ["ok", "FAILED", "skipped", "FAILED", "ok", "FAILED"]
    assert [o.state for o in outcomes] == states
    assert gpu_check.report(outcomes[:1], steps[:1], tmp_path) == 0
    capsys.readouterr()
    assert gpu_check.report(outcomes, steps, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "the reason" in printed
    assert "two\nthree" in printed
    assert "one\n" not in printed
    table = printed[printed.rindex("\nstep ") + 1 :].splitlines()
    assert [line.split()[0] for line in table[:7]] == ["step", *(step.name for step in steps)]
    assert "exit status 3" in table[2]
    assert "it is not on PATH" in table[3]
    assert "no time was left" in table[6]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "all fine" in log
    assert "the reason" in log
    assert [step["state"] for step in json.loads((tmp_path / "gpu_check.json").read_text())] == states


def test_a_step_is_killed_with_its_children(tmp_path, monkeypatch):
    """The child's lock on a file is free when it is gone. A child that lives says so before it gives the lock up. The
    limit is reached when the child has started, be that early or late."""
    locked, started, wait = tmp_path / "locked", tmp_path / "started", subprocess.Popen.wait

    def until(process, timeout=None):
        if timeout != 77:
            return wait(process, timeout)
        while not started.exists():
            assert process.poll() is None, "the step ended before its limit"
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until)
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    child = (
        f"import fcntl, time; file = open({str(locked)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        f"open({str(started)!r}, 'w').close(); time.sleep(60); print('alive', file=file, flush=True)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    )
    (outcome,) = gpu_check.run_steps([Step("slow", python(parent), 77)], tmp_path, 100)
    assert (outcome.state, outcome.note) == ("FAILED", "killed after 77 s")
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert file.read() == ""


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


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
