"""Profile a training loop: ``with profile.steps(model) as run: for batch in run(loader): ...``."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from selfsup_kernels.lab.profile import hooks, memory, parts
from selfsup_kernels.lab.profile.recorder import CPUClock, CUDAClock, Recorder
from selfsup_kernels.lab.profile.summary import own_case, summarize, text

TIMED, PLAIN, TRACED, WARMUP = "timed", "plain", "traced", "warmup"


def steps(model, *, optimizer=None, loss=None, ema=None, out=None, device=None, warmup=2, memory=True, trace=True):
    r"""Profile the steps of a training loop: where their time and their memory go.

    ::

        with sk.profile.steps(model, loss=criterion) as run:
            for batch in run(loader):
                value = criterion(model(batch))
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(run)              # run.summary is a dictionary, run.report("out") writes a page

    At every moment of a step exactly one part of it runs (:data:`PARTS`). The loop trains as it would without this:
    values and random numbers are the same. It may have any length; four steps after the warm-up have everything.

    Args:
        model: the module that is trained, or a sequence of them. Losses in it are found: the package's methods,
            PyTorch's losses, and modules of a class named ``...Loss``.
        optimizer: one, or a sequence, that is not a ``torch.optim.Optimizer``: those are found.
        loss: a loss module that is not part of ``model``, or a sequence of them. ``run.loss(function)`` wraps a
            function, and ``with run.part("loss")`` marks anything.
        ema: a module that averages and is not part of ``model``: a :class:`selfsup_kernels.EMA`, or any with
            ``update`` or ``update_parameters``. ``run.ema(function)`` wraps a function.
        out: a folder: ``report(out)`` is called at the end.
        device: where the model trains, ``cpu`` or ``cuda``; None for the device of its first parameter.
        warmup: steps before anything is measured.
        memory: measure the peak of each part, from the memory events of one step under ``torch.profiler``.
        trace: keep the Chrome trace of such a step.

    Returns:
        A context manager that gives a :class:`Run`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> method = sk.methods.SimCLR(nn.Linear(64, 32), nn.Linear(32, 16))
        >>> optimizer = torch.optim.SGD(method.parameters(), 0.1)
        >>> with sk.profile.steps(method, memory=False, trace=False) as run:
        ...     for x in run(torch.randn(6, 2, 256, 64)):
        ...         method(*x).backward()
        ...         optimizer.step()
        >>> run.summary["steps"]["timed"] > 0
        True
    """
    models, losses, calls = _list(model), _list(loss), []
    if not models:
        raise ValueError("model: expected at least one module, got none")
    for name, module in (*(("model", m) for m in models), *(("loss", m) for m in losses)):
        if not isinstance(module, nn.Module):
            hint = "; run.loss(function) wraps a function" if name == "loss" and callable(module) else ""
            raise TypeError(f"{name}: expected an nn.Module or a sequence of them, got {type(module).__name__}{hint}")
    for other in _list(optimizer):
        if not isinstance(other, torch.optim.Optimizer):
            calls.append((other, _method("optimizer", other, "step"), parts.OPTIMIZER))
    for average in _list(ema):
        calls.append((average, _method("ema", average, "update", "update_parameters"), parts.EMA))
    device = torch.device(device or next((p.device for module in models for p in module.parameters()), "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    _require_integer("warmup", warmup, 0)
    losses = list(dict.fromkeys([*losses, *hooks.losses_in(models)]))
    return Run(models, losses, calls, device, out, warmup, memory, trace)


class Run:
    """A profile in the making, and its results. Made by :func:`steps`.

    Attributes:
        device: where the model trains.
        counts: kind of steps -> how many have been run.
    """

    def __init__(self, models, losses, calls, device, out, warmup, memory, trace):
        self._parts = models, losses, calls
        self._loss_known = bool(losses or hooks.own_losses(models))
        self.device, self._cuda, self._out, self._warmup = device, device.type == "cuda", out, warmup
        self._memory, self._keep_trace = memory, trace
        self._clock = CUDAClock(device) if self._cuda else CPUClock()
        self.counts = dict.fromkeys((WARMUP, TIMED, PLAIN, TRACED), 0)
        self._waiting, self._timed, self._plain, self._warnings = [], [], [], []
        self._state = "new"
        self._peaks = self._loop = self._kind = self._recorder = self._trace = None
        self._hooks = contextlib.ExitStack()

    def __enter__(self):
        if self._state != "new":
            raise RuntimeError("profile.steps: a run can be entered once; call steps() again")
        self._state = "running"
        self._folder = tempfile.TemporaryDirectory()  # until nothing refers to the run any more
        self._traced = Path(self._folder.name) / "trace.json"
        return self

    def __exit__(self, kind, *exception):
        self._abandon()
        self._loop, self._state = None, "done"
        if self._cuda:
            torch.cuda.synchronize(self.device)
        self._collect()
        if self._memory and self._traced.exists():
            self._peaks = memory.peaks(self._traced, self._cuda)
        if not self._keep_trace:
            self._traced.unlink(missing_ok=True)
        if kind is None and self._out is not None:
            self.report(self._out)

    def __call__(self, loader: Iterable, *, accumulate: int = 1) -> Iterator:
        """Iterate over ``loader``, each ``accumulate`` batches of which are one step.

        May be called again, for a further epoch.

        Raises:
            RuntimeError: outside of the ``with`` block.
        """
        if self._state != "running":
            raise RuntimeError("profile.steps: expected run(loader) inside its with block")
        _require_integer("accumulate", accumulate, 1)
        return self._steps(loader, accumulate)

    def _steps(self, loader, accumulate):
        """Yield the loader's batches; asking for one ends the step before."""
        self._abandon()  # a loop before this one that was left early
        loop = self._loop = object()
        batches = None
        try:
            while True:
                self._begin()
                for i in range(accumulate):
                    if i:
                        self._recorder.data_is_wanted()
                    batches = iter(loader) if batches is None else batches  # starts workers: that is time for data
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                    self._recorder.replace(parts.OTHER)
                    yield batch
                    if self._loop is not loop:
                        return
                self._end()
        finally:
            if self._loop is loop:
                self._abandon()

    def part(self, name):
        """Return a context manager: what runs in it is the part ``name``, such as "loss", "ema" or "encoder"."""
        name = parts.OWN_NAMES.get(name, name)
        if name not in parts.PARTS:
            raise ValueError(f"name: expected one of {', '.join([*parts.OWN_NAMES, *parts.PARTS])}, got {name!r}")
        self._loss_known |= name == parts.LOSS_FORWARD
        return self._inside(name)

    @contextlib.contextmanager
    def _inside(self, name):
        recorded = self._recorder is not None and self._recorder.ranges
        with self._recorder.inside(name) if recorded else contextlib.nullcontext():
            yield

    def loss(self, function):
        """Wrap ``function``: its calls are the loss."""
        return self.part(parts.LOSS_FORWARD)(function)

    def ema(self, function):
        """Wrap ``function``: its calls update a moving average."""
        return self.part(parts.EMA)(function)

    @property
    def summary(self) -> dict:
        """Return times, peaks and warnings; see ``docs/profile.md``."""
        if self._state != "done":
            raise RuntimeError("profile.steps: expected the end of the with block before the summary is read")
        warnings = list(self._warnings)
        if self._memory and self._timed and self._peaks is None:
            warnings.append("Peak memory is not known: the loop was too short, or another profiler is at work.")
        measured = {"timed": self._timed, "plain": self._plain, "peaks": self._peaks, "warnings": warnings}
        return summarize(device=str(self.device), counts=self.counts, loss_known=self._loss_known, **measured)

    def report(self, out):
        """Write ``report.html``, ``profile.json`` and the trace into the folder ``out``; needs the extra ``report``."""
        from selfsup_kernels.core import info
        from selfsup_kernels.lab.profile import report

        absent = info.missing("profile")
        if absent:
            raise ModuleNotFoundError(f"report: {', '.join(absent)} missing; run: {info.install(absent)}")
        case = own_case(self.save_trace(out)) | {"trace": "trace.json" if self._traced.exists() else None}
        return report.write(report.results(self.device, workload=None, cases=[case], largest=None, seconds=None), out)

    def save_trace(self, out):
        """Copy ``trace.json`` to ``out``, and return the summary."""
        summary = self.summary  # raises before anything is written
        shutil.copytree(self._folder.name, out, dirs_exist_ok=True)
        return summary

    def __str__(self):
        if self._state != "done":
            return "profile.steps: running"
        from selfsup_kernels.lab.profile import report

        summary = self.summary
        return f"{report.answer({'cases': [own_case(summary)]})}\n{text(summary)}"

    def _begin(self):
        done = self.counts[TIMED] + self.counts[PLAIN]
        if self.counts[WARMUP] < self._warmup:
            self._kind = WARMUP
        elif done >= 3 and not self.counts[TRACED] and (self._memory or self._keep_trace):
            self._kind = TRACED
        else:  # in the order A B B A, which a steady drift of the machine does not tell apart
            self._kind = TIMED if done % 4 in (0, 3) else PLAIN
        self._recorder = Recorder(self._clock, ranges=self._kind in (TIMED, TRACED))
        if self._recorder.ranges:
            hooks.attach(self._hooks, self._recorder, *self._parts)
        if self._kind == TRACED:
            if torch.autograd._profiler_enabled():  # a second one would end the first
                self._warnings.append("There is no trace: another profiler is at work.")
            else:
                self._trace = memory.start_trace(self._cuda)
        self._recorder.begin()

    def _end(self):
        kind, recorder, trace = self._kind, self._recorder, self._trace
        recorder.end()
        self._abandon()
        if trace is not None:
            trace.export_chrome_trace(str(self._traced))
        if kind in (TIMED, PLAIN):
            self._waiting.append((kind, recorder))
            self._collect()
        self.counts[kind] += 1

    def _abandon(self):
        """Take hooks and profiler away, at the end of a step or where it was left early."""
        if self._recorder is not None:
            self._recorder.close()
        self._hooks.close()
        if self._trace is not None:
            self._trace.stop()
        self._kind = self._recorder = self._trace = None

    def _collect(self):
        """Read the marks of steps that the device has finished."""
        while self._waiting and (seconds := self._waiting[0][1].seconds()) is not None:
            kind, _ = self._waiting.pop(0)
            self._timed.append(seconds) if kind == TIMED else self._plain.append(sum(seconds.values()))


def _require_integer(name, value, least):
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _method(argument, owner, *names) -> str:
    """Return the first of ``names`` that ``owner`` has as a method."""
    name = next((name for name in names if callable(getattr(owner, name, None))), None)
    if name is None:
        raise TypeError(f"{argument}: expected an object with {names[0]}(), got {type(owner).__name__}")
    return name
