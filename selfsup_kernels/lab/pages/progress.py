"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time

SILENT = 30.0
"""Seconds without a line, in a file, after which the next step has one."""


class Progress:
    """``with Progress() as p: p.stage("name", steps); p.advance()``.

    ``stages``: how many there are, to number them.
    """

    def __init__(self, stream=None, stages=0):
        self.stream, self.stages, self.number = stream or sys.stdout, stages, 0
        self.live = None
        if self.stream.isatty():
            from rich import progress
            from rich.console import Console

            note = progress.TextColumn("{task.fields[note]}")
            columns = [*progress.Progress.get_default_columns()[:3], progress.TimeElapsedColumn(), note]
            self.live = progress.Progress(*columns, console=Console(file=self.stream))

    def __enter__(self):
        self.begin = self.said = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def stage(self, name, total, seconds=None):
        """Begin a stage of ``total`` steps, which takes about ``seconds``."""
        self.number += 1
        self.name, self.total, self.done = f"{self.number}/{self.stages} {name}" if self.stages else name, total, 0
        note = f"about {seconds} s" if seconds else ""
        if self.live:
            self.task = self.live.add_task(self.name, total=total, note=note)
        elif note:
            self.say(f"{self.name}: {note}")

    def advance(self, note=""):
        self.done += 1
        if self.live:
            self.live.update(self.task, advance=1, note=note)
        elif (
            self.done % max(1, self.total // 4) == 0 or self.done == self.total or time.monotonic() - self.said > SILENT
        ):
            self.say(f"{self.name}  {self.done}/{self.total}  {note}".rstrip())

    def say(self, line):
        """Print a line, above the bar if there is one."""
        if self.live:
            self.live.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self.said = time.monotonic()
            print(f"[{self.said - self.begin:5.0f} s] {line}", file=self.stream, flush=True)
