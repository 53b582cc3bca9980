"""Fresh processes, and what a process knows of its memory."""

import signal
import subprocess
import sys
import types

import pytest
import torch

from selfsup_kernels.lab import fresh, host_memory

psutil = pytest.importorskip("psutil")

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of private memory are Linux's")


def test_result_and_failure():
    facts = "[__import__('torch').get_num_threads(), __import__('os').getenv('SOME_NAME')]"
    assert fresh.call("builtins:eval", facts, environment={"SOME_NAME": "x"}) == [torch.get_num_threads(), "x"]
    with pytest.raises(fresh.Failed, match="ZeroDivisionError") as failure:
        fresh.call("operator:truediv", 1, 0)
    assert not isinstance(failure.value, fresh.OutOfMemory)
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.call("time:sleep", 60, timeout=1)


@LINUX
def test_refused_memory_is_told_from_other_failures(monkeypatch):
    with pytest.raises(fresh.OutOfMemory):
        fresh.call("torch:empty", 1 << 55)
    with pytest.raises(fresh.OutOfMemory):
        fresh.call("builtins:bytearray", 16 << 30, memory_limit=8 << 30)
    killed = types.SimpleNamespace(returncode=-signal.SIGKILL, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(fresh.OutOfMemory):
        fresh.call("operator:add", 1, 2)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_refusals(error, verdict):
    assert host_memory.refused(error) is verdict


@LINUX
def test_available_heeds_control_groups(tmp_path, monkeypatch):
    assert 0 < host_memory.available() <= psutil.virtual_memory().total
    (tmp_path / "groups" / "a" / "b").mkdir(parents=True)
    for group, most in ((tmp_path / "groups" / "a", "5000000"), (tmp_path / "groups" / "a" / "b", "max")):
        (group / "memory.max").write_text(most)
        (group / "memory.current").write_text("2000000")
        (group / "memory.stat").write_text("anon 1\ninactive_file 1000")
    (tmp_path / "own").write_text("4:cpu:/\n0::/a/b\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    assert host_memory.available() == 3_001_000


@LINUX
def test_growth_and_fields():
    size = 96 << 20
    assert host_memory.status("VmRSS") > 0
    assert host_memory.status("NoSuchField") is None
    host_memory.trim()
    assert 0.9 * size < host_memory.peak_growth(lambda: torch.ones(size, dtype=torch.uint8)) < 1.2 * size
