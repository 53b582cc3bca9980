"""The command that checks everything on a GPU, with steps that need none: limits, failures, the table at the end."""

import fcntl
import sys

import pytest
from helpers import benchmarks_script

gpu_check = benchmarks_script("gpu_check")
Step = gpu_check.Step


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_a_failure_hides_no_later_step(capfd):
    steps = [
        Step("good", python("print('all fine'); raise SystemExit(5)"), 2000, fine=(0, 5)),
        Step("bad", python("print('the reason'); raise SystemExit(3)"), 2000),
        Step("absent", ["no such command"], 2000, skip="it is not on PATH"),
        Step("missing", ["./no-such-command"], 2000),
        Step("late", ["true"], 0),
    ]
    assert gpu_check.run_steps(steps[:1], 10_000) == 0
    assert gpu_check.run_steps(steps, 10_000) == 1
    printed = capfd.readouterr().out
    assert "all fine" in printed
    assert "the reason" in printed
    table = printed[printed.rindex("\nstep ") + 1 :].splitlines()
    states = ["ok", "FAILED: exit status 3", "skipped: it is not on PATH", "FAILED", "FAILED: no time was left"]
    for line, step, state in zip(table[1:], steps, states, strict=True):
        assert line.startswith(step.name)
        assert state in line


def test_a_step_is_killed_with_its_children(tmp_path, monkeypatch):
    """The child's lock on a file is free when it is gone. A child that lives says so before it gives the lock up."""
    locked = tmp_path / "locked"
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    child = (
        f"import fcntl, time; file = open({str(locked)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "time.sleep(60); print('alive', file=file, flush=True)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    )
    assert gpu_check.run_step(Step("slow", python(parent), 100), 3) == "FAILED: killed after 3 s"
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
