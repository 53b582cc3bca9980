"""The CUDA paths of profile.steps, as far as a CPU allows: a backward in another thread, events, peaks."""

import threading
import types

import pytest
import torch
from profile_cases import Encoder, SquareLoss, batches, close, seconds

import selfsup_kernels as sk
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.profile import largest, memory, parts, workload
from selfsup_kernels.lab.profile.recorder import CPUClock


class Event:
    """A CUDA event whose stream is this process."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "stream of cuda"
        self.when = CPUClock.read()

    def query(self):
        return True

    def elapsed_time(self, end):
        return 1e3 * (end.when - self.when)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as the profile uses it; ranges that NVTX has begun, and those that it has ended."""
    begun, ended = [], []
    used = iter(range(1_000_000, 10**9, 1_000_000))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(used))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: begun.append(name) or len(begun))
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: ended.append(number))
    backward = torch.autograd.backward

    def in_a_thread(*args, **kwargs):
        thread = threading.Thread(target=backward, args=args, kwargs=kwargs)
        thread.start()
        thread.join()

    monkeypatch.setattr(torch.autograd, "backward", in_a_thread)
    return begun, ended


def test_parts_where_the_backward_has_its_own_thread(cuda, counted_time):
    begun, ended = cuda
    model, criterion = Encoder(0.005, 0.012), SquareLoss(0.008, 0.016)
    with sk.profile.steps(model, loss=criterion, device="cuda", trace=False) as run:
        for x in run(batches(8)):
            criterion(model(x)).backward()
    close(
        seconds(run),
        {"encoder forward": 0.005, "loss forward": 0.008, "loss backward": 0.016, "encoder backward": 0.012},
    )
    assert ended == list(range(1, len(begun) + 1))
    assert begun[:7] == [
        f"selfsup_kernels: {part}"
        for part in ("data", "other", "encoder forward", "other", "loss forward", "other", "loss backward")
    ]
    assert run.summary["peak_bytes"] == max(row["peak_bytes"] or 0 for row in run.summary["parts"]) > 0
    assert run.summary["device"] == "cuda"


def test_ranges_end_in_the_thread_that_began_them(cuda, monkeypatch):
    """The backward's thread has the loss' range, begun and ended there; around both parts is one of the main thread."""
    begun, ended = [], []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            begun.append((self.name.removeprefix(parts.PREFIX), threading.get_ident()))

        def __exit__(self, *exception):
            ended.append((self.name.removeprefix(parts.PREFIX), threading.get_ident()))

    monkeypatch.setattr(torch.profiler, "record_function", Range)
    model, criterion = Encoder(), SquareLoss()
    with sk.profile.steps(model, loss=criterion, device="cuda", warmup=0, memory=False, trace=False) as run:
        for x in run(batches(1)):
            criterion(model(x)).backward()
    assert sorted(begun) == sorted(ended)
    home = threading.get_ident()
    assert [name for name, thread in begun if thread != home] == ["loss backward"]
    order = [name for name, thread in begun if thread == home and name != "other"]
    assert order == ["data", "encoder forward", "loss forward", "backward"]


def test_a_memory_snapshot_that_pytorch_cannot_make_is_said_to_be_missing(monkeypatch, tmp_path):
    def gone(*args, **kwargs):
        raise TypeError("other arguments")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", gone)
    trace = memory.Trace(torch.device("cuda"), tmp_path)
    trace._record_history()
    assert "no memory snapshot: other arguments" in trace.problem
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    trace._save_history()
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0


def test_no_history_is_recorded_after_a_step_that_was_broken_off(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: told.append(options))
    trace = memory.Trace(torch.device("cuda"), tmp_path)
    trace.profiler = types.SimpleNamespace(stop=lambda: None)
    trace.abandon()
    trace.abandon()
    assert told == [{"enabled": None}]

    def broken():
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", broken)
    trace._save_history()
    assert "not today" in trace.problem
    assert told[1:] == [{"enabled": None}]


def test_the_largest_batch_is_searched_under_the_limit(monkeypatch):
    """Its process takes that share of the GPU, and no more."""
    told = []
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    workload.claim("cuda:1", 16 * 10**9)
    workload.claim("cuda")
    workload.claim("cpu", 10**9)
    assert told == ["cuda:1", 0.2, "0"]
    asked = []
    monkeypatch.setattr(fresh, "call", lambda *arguments, **options: asked.append((arguments, options)))
    work = workload.Workload(device="cuda")
    largest.survives(work, 123)
    assert asked == [(("selfsup_kernels.lab.profile.workload:survives", work.json(), 123), {})]
