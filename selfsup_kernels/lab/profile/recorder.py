"""The record of one step: a clock, the parts that follow each other, and named ranges for profilers."""

import threading
import time
from itertools import pairwise

import torch

from selfsup_kernels.lab.profile import parts

try:
    from torch._C._autograd import _get_sequence_nr as next_node
except ImportError:

    def next_node():
        """The number that the next node of this thread's graph gets."""
        return torch.zeros((), requires_grad=True).view(())._sequence_nr() + 1


class CPUClock:
    read = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(begin, end) -> float:
        return end - begin

    @staticmethod
    def passed(mark) -> bool:
        return True


class CUDAClock:
    """Events on the device's current stream: nothing waits for the GPU inside a step."""

    def __init__(self, device):
        self.device = device

    def read(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @staticmethod
    def seconds(begin, end) -> float:
        return begin.elapsed_time(end) / 1e3

    @staticmethod
    def passed(mark) -> bool:
        return mark.query()


class Ranges:
    """The parts as named ranges that any profiler shows.

    A ``record_function`` ends in the thread that began it. On CUDA the backward runs in a thread of its own, so one
    range ``backward`` is around both of its parts; NVTX ranges, which end in any thread, tell them apart.
    """

    def __init__(self, cuda):
        self.cuda, self.home = cuda, threading.get_ident()
        self.range = self.nvtx = None

    def switch(self, part):
        """Begin the range of ``part``, or none, and end the one before."""
        if threading.get_ident() == self.home:
            if self.range is not None:
                self.range.__exit__(None, None, None)
            self.range = None
            if part is not None:
                both = self.cuda and part in (parts.LOSS_BACKWARD, parts.ENCODER_BACKWARD)
                self.range = torch.profiler.record_function(parts.PREFIX + ("backward" if both else part))
                self.range.__enter__()
        if self.cuda:
            if self.nvtx is not None:
                torch.cuda.nvtx.range_end(self.nvtx)
            self.nvtx = torch.cuda.nvtx.range_start(parts.PREFIX + part) if part is not None else None


class Recorder:
    """One step. From each of its ``marks``, ``(reading, part)``, that part runs, so the parts add up to the step.

    ``created`` has the part in which each node of the autograd graph is made, by the number of the first one.
    """

    def __init__(self, clock, ranges=None, memory=None):
        self.clock, self.ranges, self.memory = clock, ranges, memory
        self.home = threading.get_ident()
        self.marks, self.created, self.stack = [], [], [parts.DATA]
        self.backwards = 0

    def begin(self):
        if self.memory:
            self.memory.reset()
        self._mark(parts.DATA)

    def data_is_wanted(self):
        self.stack, self.backwards = [parts.OTHER], 0  # an exception caught in the loop may leave a part open
        self.replace(parts.DATA)

    def end(self):
        if self.memory:
            self.memory.mark(self.marks[-1][1])
        self.marks.append((self.clock.read(), None))
        self.abandon()

    def abandon(self):
        if self.ranges:
            self.ranges.switch(None)

    def enter(self, part) -> bool:
        """Begin a part inside the present one; False in another thread, which is not recorded."""
        if threading.get_ident() != self.home and not self.backwards:
            return False
        # A forward that activation checkpointing repeats is part of the backward; what a loss calls is the loss.
        again = self.backwards and part in (parts.ENCODER_FORWARD, parts.LOSS_FORWARD)
        inside = self.stack[-1] == parts.LOSS_FORWARD and part == parts.ENCODER_FORWARD
        self.stack.append(self.stack[-1] if again or inside else part)
        self._switch()
        return True

    def leave(self):
        if len(self.stack) > 1:
            self.stack.pop()
            self._switch()

    def replace(self, part):
        """Let another part follow the present one."""
        self.stack[-1] = part
        self._switch()

    def _switch(self):
        if self.marks[-1][1] != self.stack[-1]:
            self._mark(self.stack[-1])

    def _mark(self, part):
        if self.memory and self.marks:
            self.memory.mark(self.marks[-1][1])
        self.marks.append((self.clock.read(), part))
        if threading.get_ident() == self.home:
            self.created.append((next_node(), part))
        if self.ranges:
            self.ranges.switch(part)

    def seconds(self) -> dict:
        """Part -> seconds, of a step that has ended."""
        spent = dict.fromkeys(parts.PARTS, 0.0)
        for (begin, part), (end, _) in pairwise(self.marks):
            spent[part] += self.clock.seconds(begin, end)
        return spent
