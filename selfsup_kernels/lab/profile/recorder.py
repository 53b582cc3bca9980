"""Record one step: a clock, the parts that follow each other, and named ranges for profilers."""

import contextlib
import threading
import time
from itertools import pairwise

import torch
from torch._C._autograd import _get_sequence_nr as next_node

from selfsup_kernels.lab.profile import parts


class CPUClock:
    read = staticmethod(time.perf_counter)


class CUDAClock:
    """Events on the device's current stream: nothing waits for the GPU inside a step."""

    def __init__(self, device):
        self.device = device

    def read(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Recorder:
    """One step. From each of its ``marks``, ``(reading, part)``, that part runs, so the parts add up to the step.

    ``created`` has the part in which each node of the autograd graph is made, by the number of the first one. With
    ``ranges`` any profiler shows the parts as ranges.
    """

    def __init__(self, clock, ranges=False):
        self.clock, self.ranges, self.range = clock, ranges, None
        self.cuda, self.home = isinstance(clock, CUDAClock), threading.get_ident()
        self.marks, self.created, self.stack = [], [], [parts.DATA]
        self.backwards = False

    def begin(self):
        self._mark()

    def data_is_wanted(self):
        self.stack, self.backwards = [parts.OTHER], False  # an exception caught in the loop may leave a part open
        self.replace(parts.DATA)

    def end(self):
        self.marks.append((self.clock.read(), None))
        self.close()

    def close(self):
        if self.range is not None:
            self.range.__exit__(None, None, None)
        self.range = None

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

    @contextlib.contextmanager
    def inside(self, part):
        """Return a context manager and decorator: what runs in it is ``part``."""
        entered = self.enter(part)
        try:
            yield
        finally:
            if entered:
                self.leave()

    def replace(self, part):
        """Let another part follow the present one."""
        self.stack[-1] = part
        self._switch()

    def _switch(self):
        if self.marks[-1][1] != self.stack[-1]:
            self._mark()

    def _mark(self):
        part = self.stack[-1]
        self.marks.append((self.clock.read(), part))
        # On CUDA the backward has its own thread, and a range ends in the thread that began it: one is around both.
        if threading.get_ident() == self.home:
            self.created.append((next_node(), part))
            self.close()
            if self.ranges:
                both = self.cuda and part in (parts.LOSS_BACKWARD, parts.ENCODER_BACKWARD)
                self.range = torch.profiler.record_function(parts.PREFIX + ("backward" if both else part))
                self.range.__enter__()

    def seconds(self) -> dict | None:
        """Return part -> seconds of a step that has ended; None before the device has finished it."""
        if self.cuda and not self.marks[-1][0].query():
            return None
        spent = dict.fromkeys(parts.PARTS, 0.0)
        for (begin, part), (end, _) in pairwise(self.marks):
            spent[part] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        return spent
