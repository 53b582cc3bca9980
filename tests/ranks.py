"""Processes that form groups (gloo, on the CPU). They are started once and run many functions, since starting a process
takes longer than nearly all of these functions."""

import contextlib
import datetime
import multiprocessing
import os
import shutil
import tempfile
import traceback

import torch
import torch.distributed as dist

TIMEOUT = 600.0
"""Seconds that a process waits for its peers. A process only dies if a test wants it to, and peers notice at once."""


def _work(rank, size, store, pipe):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, size + 1)}
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, world, arguments = task
        try:
            pipe.send((function(groups[world], *arguments), None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Ranks:
    """``size`` processes; ``run(n, function, ...)`` calls ``function(group, ...)`` in the first n of them."""

    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        self._store = tempfile.mkdtemp()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = os.path.join(self._store, "store")
            process = context.Process(target=_work, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world, function, *arguments):
        """Return the results by rank. ``function`` is a module's; an error in a process is an AssertionError here."""
        self.start(world, function, *arguments)
        answers = [self.answer(rank) for rank in range(world)]
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"rank {rank} of {world}: {error}"
        return [result for result, _ in answers]

    def start(self, world, function, *arguments):
        for pipe in self._pipes[:world]:
            pipe.send((function, world, arguments))

    def answer(self, rank):
        """Return (result, error) of the started function."""
        assert self._pipes[rank].poll(2 * TIMEOUT), f"rank {rank} does not answer"
        return self._pipes[rank].recv()

    def close(self):
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # the process has ended, or is about to
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        shutil.rmtree(self._store, ignore_errors=True)
