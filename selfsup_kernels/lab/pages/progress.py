"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time


class Progress:
    """``with Progress() as p: p.stage("name", steps); p.advance()``."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = None
        if self.stream.isatty():
            from rich import progress
            from rich.console import Console

            note = progress.TextColumn("{task.fields[note]}")
            columns = [*progress.Progress.get_default_columns()[:3], progress.TimeElapsedColumn(), note]
            self.live = progress.Progress(*columns, console=Console(file=self.stream))

    def __enter__(self):
        self.begin = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def stage(self, name, total):
        self.name, self.total, self.done = name, total, 0
        if self.live:
            self.task = self.live.add_task(name, total=total, note="")

    def advance(self, note=""):
        self.done += 1
        if self.live:
            self.live.update(self.task, advance=1, note=note)
        elif self.done % max(1, self.total // 4) == 0 or self.done == self.total:
            line = f"[{time.monotonic() - self.begin:5.0f} s] {self.name}  {self.done}/{self.total}  {note}"
            print(line.rstrip(), file=self.stream, flush=True)
