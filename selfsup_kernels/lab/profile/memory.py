"""Memory over the time of a step, its peak by part, and the peak of a whole process."""

import json
from bisect import bisect_left, bisect_right
from pathlib import Path

import torch

from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.profile import parts


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

    def __init__(self, cuda, folder):
        self.cuda, self.folder = cuda, Path(folder)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
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


def timeline(trace, cuda, points=500) -> tuple:
    """Memory over the time of the step in a Chrome trace, and the peak while each part ran; bytes above the beginning.

    Returns:
        ``{"seconds": [...], "bytes": [...], "spans": [[part, begin, end], ...]}``, of more events than ``points`` the
        peaks only, and part -> bytes; None and None where the trace has no memory events.
    """
    events = json.loads(Path(trace).read_text())["traceEvents"]
    kind = 1 if cuda else 0  # c10's number of the device type
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind
    )
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(parts.PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(parts.PREFIX)
    )
    if not memory or not spans:
        return None, None
    begin, end = spans[0][0], max(span[1] for span in spans)
    memory = [event for event in memory if begin <= event[0] <= end] or memory[:1]
    times, level = [event[0] for event in memory], memory[0][1] - memory[0][2]
    used = [0, *(event[1] - level for event in memory)]  # used[i]: before the i-th event
    peaks = {}
    for first, last, name in spans:
        highest = max(used[bisect_left(times, first) : bisect_right(times, last) + 1])
        for part in (parts.LOSS_BACKWARD, parts.ENCODER_BACKWARD) if name == "backward" else (name,):
            peaks[part] = max(0, highest, peaks.get(part, 0))
    size = -(-len(memory) // points)
    kept = [max(range(i, min(i + size, len(memory))), key=lambda j: used[j + 1]) for i in range(0, len(memory), size)]
    line = {
        "seconds": [(times[i] - begin) / 1e6 for i in kept],
        "bytes": [used[i + 1] for i in kept],
        "spans": [[name, (first - begin) / 1e6, (last - begin) / 1e6] for first, last, name in spans],
    }
    return line, peaks
