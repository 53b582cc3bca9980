"""Peak memory by part, and over the time of a step."""

import contextlib
import gc
import json
import pickle
from pathlib import Path

import torch

from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.profile import parts


def sampler(device):
    """What tells the peak between marks on this device, or None where the system does not."""
    if device.type == "cuda":
        return CUDAPeaks(device)
    return ResidentPeaks() if host_memory.status("VmHWM") is not None and host_memory.reset_peak() else None


def resting(device) -> int | None:
    """Bytes in use now: of the allocator on a GPU, of the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # What earlier work left behind would be given back during the steps, and every peak would read as so much lower.
    gc.collect()
    host_memory.trim()
    return host_memory.status("VmRSS")


class ResidentPeaks:
    """Peaks of the resident set. Freed memory is given back at every mark, or one part's would count as the next's."""

    def __init__(self):
        self.peaks = {}

    def begin(self):
        host_memory.trim()
        host_memory.reset_peak()

    def mark(self, part):
        """``part`` has just ended."""
        self.peaks[part] = max(self.peaks.get(part, 0), host_memory.status("VmHWM"))
        host_memory.trim()
        host_memory.reset_peak()


class CUDAPeaks:
    """Peaks of the caching allocator, which counts where the host is: nothing has to wait for the GPU."""

    def __init__(self, device):
        self.device, self.peaks = device, {}

    def begin(self):
        torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self, part):
        self.peaks[part] = max(self.peaks.get(part, 0), torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)


class Trace:
    """One step under ``torch.profiler``, with its memory events; on a GPU the allocator's history, too."""

    def __init__(self, device, folder):
        self.device, self.folder = device, Path(folder)
        self.problem = None
        self.profiler = None

    def begin(self):
        if torch.autograd._profiler_enabled():  # a second one would end the first
            self.problem = "There is no trace: another profiler is at work."
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._record_history()
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profiler.start()

    def end(self):
        if self.profiler is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                self._save_history()
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
            self.profiler = None

    def abandon(self):
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
            if self.device.type == "cuda":
                self._stop_history()

    def _record_history(self):
        # Private in PyTorch, and its arguments have changed before: a snapshot is an extra.
        try:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        except (AttributeError, TypeError, RuntimeError) as error:
            self.problem = f"There is no memory snapshot: {error}"

    def _save_history(self):
        try:
            snapshot = torch.cuda.memory._snapshot()
            (self.folder / "snapshot.pickle").write_bytes(pickle.dumps(snapshot))
        except (AttributeError, TypeError, RuntimeError) as error:
            self.problem = f"There is no memory snapshot: {error}"
        self._stop_history()

    def _stop_history(self):
        with contextlib.suppress(AttributeError, TypeError, RuntimeError):
            torch.cuda.memory._record_memory_history(enabled=None)


def timeline(trace, cuda, points=1500) -> dict | None:
    """Memory over the time of the step in a Chrome trace, and its parts.

    Returns:
        ``{"seconds": [...], "bytes": [...], "spans": [[part, begin, end], ...]}`` from the beginning of the step, bytes
        above its level there; None where the trace has no memory events. Of many events the peaks are kept.
    """
    events = json.loads(Path(trace).read_text())["traceEvents"]
    kind = 1 if cuda else 0  # c10's number of the device type
    memory, spans = [], []
    for event in events:
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind:
            memory.append((event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"]))
        elif event.get("cat") == "user_annotation" and event["name"].startswith(parts.PREFIX):
            spans.append((event["name"].removeprefix(parts.PREFIX), event["ts"], event["ts"] + event["dur"]))
    if not memory or not spans:
        return None
    memory.sort()
    spans.sort(key=lambda span: span[1])
    begin, end = spans[0][1], max(span[2] for span in spans)
    memory = [event for event in memory if begin <= event[0] <= end] or memory[:1]
    level = memory[0][1] - memory[0][2]
    kept = _highest(memory, points)
    return {
        "seconds": [(when - begin) / 1e6 for when, *_ in kept],
        "bytes": [total - level for _, total, _ in kept],
        "spans": [[name, (a - begin) / 1e6, (b - begin) / 1e6] for name, a, b in spans],
    }


def _highest(events, count):
    """At most about ``count`` events: of each stretch the first, the highest and the lowest."""
    if len(events) <= count:
        return events
    size = -(-3 * len(events) // count)
    kept = []
    for i in range(0, len(events), size):
        stretch = events[i : i + size]
        three = {stretch[0], max(stretch, key=lambda e: e[1]), min(stretch, key=lambda e: e[1])}
        kept += sorted(three)
    return kept
