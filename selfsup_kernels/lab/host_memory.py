"""A process's memory, as the operating system sees it: what one piece of work takes, and how much there is.

Peaks are best measured in a fresh process (:mod:`selfsup_kernels.lab.fresh`): an allocator that keeps what earlier work
has freed would hide what this work needs.
"""

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def peak_growth(work) -> int | None:
    """Bytes by which the resident set rose above its level at the start while ``work()`` ran; None if not known."""
    if status("VmHWM") is not None:
        reset_peak()
        start = status("VmHWM")
        work()
        return status("VmHWM") - start
    try:
        import resource
    except ImportError:
        work()
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * unit


def reset_peak() -> bool:
    """Set the high-water mark of the resident set (``VmHWM``) back to the present level; whether that was allowed.

    Where it is not, the mark of what was before stands, and a growth below it reads as zero.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def status(name) -> int | None:
    """Bytes of one field of this process's status, such as ``VmRSS``, ``VmHWM`` or ``VmData``; None off Linux."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def resident() -> int:
    """Bytes of the resident set now."""
    import psutil

    return psutil.Process().memory_info().rss


def trim() -> None:
    """Give memory that was freed, and that the C library's allocator keeps, back to the system, where it can."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no such library
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int:
    """Bytes that this process may still take: what the system has left, or its control groups, if that is less."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def _left_in_groups():
    """What each memory limit of this process's control groups (version 1 or 2) and of those above them leaves."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's: then the group mounted at the root is this process's.
        inside = root / path.lstrip("/")
        for group in (inside, *inside.parents):
            if not group.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                free = int((group / limit).read_text()) - int((group / used).read_text())
                yield free + _file_cache(group)


def _file_cache(group) -> int:
    """Pages of files that the group would give up before anything is refused."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def refused(error) -> bool:
    """Whether an exception says that memory could not be had: of a GPU, of torch's CPU allocator, or of C++."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(words in text for words in REFUSALS)


REFUSALS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc", "out of memory")
