"""What one step's marks are made of: a clock, the parts that follow each other, and named ranges for profilers."""

import threading
import time

import torch

from selfsup_kernels.lab.profile import parts

try:
    from torch._C._autograd import _get_sequence_nr as next_node
except ImportError:  # the number that the next node of this thread's graph gets, by making one

    def next_node():
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
    """Events on the device's stream that is current where the mark is made: nothing waits for the GPU inside a step."""

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
    """The parts as named ranges, which any profiler shows.

    A ``record_function`` has to end in the thread that began it. On CUDA the backward runs in a thread of its own, in
    which nothing of ours runs at its end: there the encoder's part of the backward has no such range of its own (the
    thread that called ``backward()`` has one around both), but an NVTX range, which may end anywhere.
    """

    def __init__(self, cuda):
        self.cuda = cuda
        self.home = threading.get_ident()
        self.open = {}
        self.nvtx = None

    def switch(self, part):
        here = threading.get_ident()
        self._close(here)
        name = part
        if self.cuda and part in (parts.LOSS_BACKWARD, parts.ENCODER_BACKWARD):
            if here == self.home:
                name = "backward"
            elif part == parts.ENCODER_BACKWARD:
                name = None
        if name is not None:
            self.open[here] = torch.profiler.record_function(parts.PREFIX + name)
            self.open[here].__enter__()
        if self.cuda:
            self._end_nvtx()
            self.nvtx = torch.cuda.nvtx.range_start(parts.PREFIX + part)

    def arrived(self, part):
        """A part goes on in this thread."""
        here = threading.get_ident()
        if part == parts.LOSS_BACKWARD and here not in self.open:
            self.open[here] = torch.profiler.record_function(parts.PREFIX + part)
            self.open[here].__enter__()

    def finish(self):
        self._close(threading.get_ident())
        self._end_nvtx()

    def _close(self, thread):
        if thread in self.open:
            self.open.pop(thread).__exit__(None, None, None)

    def _end_nvtx(self):
        if self.nvtx is not None:
            torch.cuda.nvtx.range_end(self.nvtx)
            self.nvtx = None


class Recorder:
    """One step: from each of its ``marks``, ``(reading, part)``, that part runs; so the parts add up to the step.

    ``created``: from which number on the nodes of the autograd graph were made in which part. A node's backward belongs
    where its forward did.
    """

    def __init__(self, clock, ranges=None, memory=None):
        self.clock, self.ranges, self.memory = clock, ranges, memory
        self.home = threading.get_ident()
        self.marks, self.created = [], []
        self.stack = []
        self.backwards = 0

    @property
    def other_threads(self) -> bool:
        """Whether a backward runs in threads of its own, and ranges have to know."""
        return self.ranges is not None and self.ranges.cuda

    def arrived(self):
        """The backward has begun to run in its thread."""
        self.ranges.arrived(self.stack[-1])

    def begin(self):
        self.stack = [parts.DATA]
        if self.memory:
            self.memory.begin()
        self._mark(parts.DATA)

    def data_has_come(self):
        self.replace(parts.OTHER)

    def data_is_wanted(self):
        self.stack = [parts.OTHER]  # also where an exception, caught in the loop, has left a part open
        self.backwards = 0
        self.replace(parts.DATA)

    def end(self):
        """No part runs any more."""
        if self.memory:
            self.memory.mark(self.marks[-1][1])
        self.marks.append((self.clock.read(), None))
        if self.ranges:
            self.ranges.finish()

    def abandon(self):
        if self.ranges:
            self.ranges.finish()

    def enter(self, part) -> bool:
        """A part begins inside the present one; whether it counts (not in a thread of its own)."""
        if not self.stack or (threading.get_ident() != self.home and not self.backwards):
            return False
        # Activation checkpointing runs forwards again inside the backward: those are part of the backward.
        again = self.backwards and part in (parts.ENCODER_FORWARD, parts.LOSS_FORWARD)
        # What a loss calls is the loss: a temperature module, another loss.
        inside = self.stack[-1] == parts.LOSS_FORWARD and part == parts.ENCODER_FORWARD
        self.stack.append(self.stack[-1] if again or inside else part)
        self._switch()
        return True

    def leave(self):
        if len(self.stack) > 1:
            self.stack.pop()
            self._switch()

    def replace(self, part):
        """Another part follows the present one."""
        if self.stack:
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
        for (begin, part), (end, _) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += self.clock.seconds(begin, end)
        return spent
