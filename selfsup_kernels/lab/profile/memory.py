"""Peak memory by part, over the time of a step, and of a whole process."""

import gc
import json
from pathlib import Path

import torch

from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.profile import parts


def sampler(device):
    """A recorder's memory on this device, or None where the system tells no peak."""
    if device.type == "cuda":
        return CUDAPeaks(device)
    return ResidentPeaks() if host_memory.status("VmHWM") is not None and host_memory.reset_peak() else None


class Peaks:
    """The highest memory while each part ran, part -> bytes."""

    def __init__(self, device=None):
        self.device, self.peaks = device, {}

    def mark(self, part):
        """Note the peak of ``part``, which has just ended."""
        self.peaks[part] = max(self.peaks.get(part, 0), self.peak())
        self.reset()


class ResidentPeaks(Peaks):
    """Peaks of the resident set. Freed memory is given back at every mark, or the next part would inherit it."""

    def reset(self):
        host_memory.trim()
        host_memory.reset_peak()

    def peak(self):
        return host_memory.status("VmHWM")


class CUDAPeaks(Peaks):
    """Peaks of the caching allocator, which counts on the host: nothing waits for the GPU."""

    def reset(self):
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self):
        return torch.cuda.max_memory_allocated(self.device)


def resting(device) -> int | None:
    """Bytes in use now: of the allocator on a GPU, of the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()  # memory freed later, during the steps, would lower every peak
    host_memory.trim()
    return host_memory.status("VmRSS")


def process_peak(device) -> int | None:
    """Bytes that this process has taken at most, as a limit counts them; None where the system does not tell.

    On a GPU that is what the caching allocator has reserved. On a CPU it is private memory, as ``RLIMIT_DATA`` and
    ``VmData`` count it: the heap and anonymous mappings, touched or not. Its peak is that of all mappings less the
    others, program and libraries, which a process keeps.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    whole, now, private = (host_memory.status(name) for name in ("VmPeak", "VmSize", "VmData"))
    return None if None in (whole, now, private) else whole - (now - private)


def free(device) -> int:
    """Bytes that a fresh process may take."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory.available()


class Trace:
    """One step under ``torch.profiler``, with its memory events; on a GPU the allocator's history, too."""

    def __init__(self, device, folder):
        self.cuda, self.folder = device.type == "cuda", Path(folder)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profiler.start()

    def stop(self, save):
        if self.cuda and save:
            torch.cuda.synchronize()
            torch.cuda.memory._dump_snapshot(str(self.folder / "snapshot.pickle"))
        self.profiler.stop()
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        if save:
            self.profiler.export_chrome_trace(str(self.folder / "trace.json"))


def timeline(trace, cuda, points=500) -> dict | None:
    """Memory over the time of the step in a Chrome trace, and its parts.

    Returns:
        ``{"seconds": [...], "bytes": [...], "spans": [[part, begin, end], ...]}`` from the beginning of the step, bytes
        above its level there; None where the trace has no memory events. Of more events than ``points`` the peaks stay.
    """
    events = json.loads(Path(trace).read_text())["traceEvents"]
    kind = 1 if cuda else 0  # c10's number of the device type
    memory = [
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind
    ]
    spans = [
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(parts.PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(parts.PREFIX)
    ]
    if not memory or not spans:
        return None
    begin, end = min(spans)[0], max(span[1] for span in spans)
    memory = [event for event in sorted(memory) if begin <= event[0] <= end] or memory[:1]
    level = memory[0][1] - memory[0][2]
    size = -(-len(memory) // points)
    kept = [max(memory[i : i + size], key=lambda event: event[1]) for i in range(0, len(memory), size)]
    return {
        "seconds": [(when - begin) / 1e6 for when, *_ in kept],
        "bytes": [total - level for _, total, _ in kept],
        "spans": [[name, (a - begin) / 1e6, (b - begin) / 1e6] for a, b, name in sorted(spans)],
    }
