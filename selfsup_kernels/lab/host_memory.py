"""Read a process's memory as the operating system sees it: what a piece of work takes, and how much is left.

Peaks are best measured in a fresh process (:mod:`selfsup_kernels.lab.fresh`): an allocator that keeps what earlier work
has freed hides what this work needs.
"""

import contextlib
import ctypes
import re
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
REFUSALS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc", "out of memory")
REFUSALS += ("MemoryError", "OutOfMemoryError", "Thread creation failed")


def peak_growth(work) -> int | None:
    """Return the bytes by which the resident set rises above its level at the start while ``work()`` runs.

    None where the system does not tell a process its high-water mark: off Linux.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark to the present level
    start = status("VmHWM")
    work()
    return None if start is None else status("VmHWM") - start


def status(name) -> int | None:
    """Return the bytes of one field of this process's status: ``VmRSS``, ``VmHWM`` or ``VmData``; None off Linux."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def trim() -> None:
    """Give memory that was freed, and that the C library's allocator keeps, back to the system, where it can."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no such library
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int:
    """Return the bytes that this process may still take: of the system, or of its control groups if that is less."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def _left_in_groups():
    """Yield what each memory limit of this process's control group (version 2) and of those above it leaves."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        own = CGROUPS / path.lstrip("/")
        # In a container the path may be the host's: then the group mounted at the root is this process's.
        for group in () if controllers else (own, *own.parents):
            with contextlib.suppress(OSError, ValueError, TypeError):  # no such file or field, or "max"
                left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
                # Files in the cache are given up before anything is refused.
                yield left + int(re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)[1])


def refused(error) -> bool:
    """Return whether an exception says that memory could not be had: of a GPU, of torch's CPU allocator, or of C++."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in REFUSALS)
