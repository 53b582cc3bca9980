"""Show how far a command is: a bar by rich, whose last state alone is printed where the output is no terminal."""

import sys


class Progress:
    """``with Progress() as p: p.stage("name", steps); p.advance()``."""

    def __init__(self, stream=None):
        from rich import console, progress

        columns = [*progress.Progress.get_default_columns()[:3], progress.TimeElapsedColumn()]
        note = progress.TextColumn("{task.fields[note]}")
        self.bar = progress.Progress(*columns, note, console=console.Console(file=stream or sys.stdout))

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception):
        self.bar.stop()

    def stage(self, name, total):
        self.task = self.bar.add_task(name, total=total, note="")

    def advance(self, note=""):
        self.bar.update(self.task, advance=1, note=note)
