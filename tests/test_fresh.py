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
    assert fresh.call("operator:add", [1], [2]) == [1, 2]
    with pytest.raises(fresh.Failed, match="ZeroDivisionError") as failure:
        fresh.call("operator:truediv", 1, 0)
    assert not isinstance(failure.value, fresh.OutOfMemory)
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.call("time:sleep", 60, timeout=1)


def test_same_package_same_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fresh.call("torch:get_num_threads") == 1
    finally:
        torch.set_num_threads(before)
    assert fresh.call("os:getenv", "SOME_NAME", environment={"SOME_NAME": "x"}) == "x"


@LINUX
def test_refused_memory_is_told_from_other_failures():
    with pytest.raises(fresh.OutOfMemory):
        fresh.call("torch:empty", 1 << 55)
    limit = 8 << 30
    with pytest.raises(fresh.OutOfMemory):
        fresh.call("builtins:bytearray", 16 << 30, memory_limit=limit)
    assert fresh.call("operator:add", 1, 2, memory_limit=limit) == 3


@LINUX
def test_a_killed_process_is_out_of_memory(monkeypatch):
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
    free = host_memory.available()
    assert 0 < free <= psutil.virtual_memory().total
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    (groups / "a" / "b").mkdir(parents=True)
    for group, limit in ((groups / "a", "5000000"), (groups / "a" / "b", "max")):
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("2000000")
        (group / "memory.stat").write_text("anon 1\ninactive_file 1000")
    own.write_text("0::/a/b\n")
    monkeypatch.setattr(host_memory, "CGROUPS", groups)
    monkeypatch.setattr(host_memory, "OWN_GROUPS", own)
    assert host_memory.available() == 3_001_000
    own.write_text("4:cpu:/\n3:memory:/docker/x\n")
    top = groups / "memory"
    top.mkdir()
    (top / "memory.limit_in_bytes").write_text("7000")
    (top / "memory.usage_in_bytes").write_text("3000")
    (top / "memory.stat").write_text("total_inactive_file 5")
    assert host_memory.available() == 4005


@LINUX
def test_growth_and_fields():
    size = 96 << 20
    assert host_memory.status("VmRSS") > 0
    assert host_memory.status("NoSuchField") is None
    assert 0.9 * size < host_memory.peak_growth(lambda: torch.ones(size, dtype=torch.uint8)) < 1.2 * size
    host_memory.trim()
    assert host_memory.resident() > 0
