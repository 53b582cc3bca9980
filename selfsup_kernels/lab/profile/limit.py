"""A process's peak in the terms of the limit that the advice is for, and what that limit is here.

On a CPU that is *private memory*, what ``RLIMIT_DATA`` and ``VmData`` count: heap and anonymous mappings, touched or
not, the stacks of threads among them; program and libraries are not part of it. On a GPU it is what the caching
allocator has reserved.
"""

import threading

import torch

from selfsup_kernels.lab import host_memory

INTERVAL = 0.0005
"""Seconds between two looks: large blocks live longer, since filling them takes that long."""


class Peak:
    """``with peak: work()``, then ``peak.bytes``; None where the system does not tell."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.bytes = None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif host_memory.status("VmData") is not None:
            self.bytes = private()
            self.stop = threading.Event()
            before = threading.stack_size(256 << 10)  # a thread's stack is private memory, too
            self.thread = threading.Thread(target=self._look, daemon=True)
            self.thread.start()
            threading.stack_size(before)
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_reserved(self.device)
        elif self.bytes is not None:
            self.stop.set()
            self.thread.join()

    def _look(self):
        while not self.stop.wait(INTERVAL):
            self.bytes = max(self.bytes, private())


def private() -> int:
    """Bytes of private memory of this process. As ``VmData``, from a file that is quicker to read."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * PAGE


PAGE = 4096
try:
    import resource

    PAGE = resource.getpagesize()
except ImportError:
    pass


def known(device) -> bool:
    """Whether the system tells peaks: a GPU's allocator does, and Linux."""
    return torch.device(device).type == "cuda" or host_memory.status("VmData") is not None


def default(device) -> int:
    """Bytes that a fresh process may take."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory.available()
