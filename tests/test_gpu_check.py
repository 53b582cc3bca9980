"""The command that checks everything on a GPU, with steps that need none: limits, failures, the table at the end."""

import fcntl
import json
import os
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
        Step("good", python("print('all fine')"), 20),
        Step("bad", python("print('the reason'); raise SystemExit(3)"), 20),
        Step("absent", ["no such command"], 20, skip="it is not on PATH"),
        Step("figures", lambda limit: python(f"print('one\\ntwo\\n{limit < 20}')"), 15, show=2),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 100)
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
    steps = [Step("good", python("raise SystemExit(5)"), 20, fine=(0, 5))]
    assert gpu_check.report(gpu_check.run_steps(steps, tmp_path, 100), steps, tmp_path) == 0


def test_a_step_is_killed_with_its_children(tmp_path, monkeypatch):
    """The child's lock on a file is free when it is gone."""
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    locked = tmp_path / "locked"
    child = (
        f"import fcntl, time; file = open({str(locked)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('begun', file=file, flush=True); time.sleep(100)"
    )
    parent = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); "
        f"subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    )
    (outcome,) = gpu_check.run_steps([Step("slow", python(parent), 3)], tmp_path, 100)
    assert (outcome.state, outcome.note) == ("FAILED", "killed after 3 s")
    assert locked.read_text() == "begun\n"
    with locked.open() as file:
        deadline = time.monotonic() + 50
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the child lives"
                time.sleep(0.05)


def test_what_had_failed_before_the_limit_is_seen(tmp_path):
    """As pytest prints it: a step is interrupted before it is killed."""
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_bad(): assert 2 == 3, 'the reason'\ndef test_slow(): time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, str(test)]
    began = time.perf_counter()
    (outcome,) = gpu_check.run_steps([Step("tests", command, 10)], tmp_path, 100)
    assert (outcome.state, outcome.note) == ("FAILED", "killed after 10 s")
    assert time.perf_counter() - began < 60  # the test's sleep
    assert any("the reason" in line for line in outcome.tail)


def test_later_steps_keep_the_time_that_is_reserved_for_them(tmp_path):
    steps = [
        Step("slow", python("import time; time.sleep(60)"), 60, reserve=8),
        Step("quick", python("print('done')"), 60),
        Step("nothing left", python("pass"), 60, reserve=100),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, 10)
    assert [o.state for o in outcomes] == ["FAILED", "ok", "FAILED"]
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
