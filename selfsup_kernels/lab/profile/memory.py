"""Measure memory: its peak while each part of a step ran, from a trace, and the peak of a whole process."""

import json
from bisect import bisect_left, bisect_right
from pathlib import Path

import torch

from selfsup_kernels.lab import host_memory
from selfsup_kernels.lab.profile import parts


def process_peak(device) -> int | None:
    """Return the bytes that this process has taken at most, as a limit counts them; None where it is not known.

    On a GPU that is what the caching allocator has reserved. On a CPU it is private memory, as ``RLIMIT_DATA`` and
    ``VmData`` count it: the heap and anonymous mappings, touched or not. Its peak is that of all mappings less the
    others, program and libraries, which a process keeps.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    whole, now, private = (host_memory.status(name) for name in ("VmPeak", "VmSize", "VmData"))
    return None if None in (whole, now, private) else whole - (now - private)


def free(device) -> int:
    """Return the bytes that a fresh process may take."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory.available()


def start_trace(cuda):
    """Start ``torch.profiler`` with its memory events for one step."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    profiler.start()
    return profiler


def peaks(trace, cuda) -> dict | None:
    """Return part -> bytes above the beginning of the step in a Chrome trace; None where it has no memory events."""
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
    memory = [event for event in memory if spans and event[0] >= spans[0][0]]
    if not memory:
        return None
    times, level = [event[0] for event in memory], memory[0][1] - memory[0][2]
    used = [0, *(event[1] - level for event in memory)]  # used[i]: before the i-th event
    found = {}
    for first, last, name in spans:
        highest = max(used[bisect_left(times, first) : bisect_right(times, last) + 1])
        for part in (parts.LOSS_BACKWARD, parts.ENCODER_BACKWARD) if name == "backward" else (name,):
            found[part] = max(0, highest, found.get(part, 0))
    return found
