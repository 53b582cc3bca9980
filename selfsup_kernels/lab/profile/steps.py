"""The profile of a training loop: ``with profile.steps(model) as run: for batch in run(loader): ...``."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from selfsup_kernels.lab.profile import hooks, memory, parts
from selfsup_kernels.lab.profile.recorder import CPUClock, CUDAClock, Ranges, Recorder
from selfsup_kernels.lab.profile.summary import summarize, text

TIMED, PLAIN, MEMORY, TRACED, WARMUP = "timed", "plain", "memory", "traced", "warmup"


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

    A step is what happens from asking the loader for a batch to asking it for the next one. It is split into data,
    encoder forward, loss forward, loss backward, encoder backward, optimizer, EMA and other; at every moment exactly
    one of them runs. The loop trains as it would without this: values and random numbers are the same.

    After ``warmup`` steps that are not measured, steps with and without marks take turns, so that what the marks cost
    can be seen; one further step each, early on, is for memory and for the trace. The loop may have any length; five
    steps after the warm-up are the least that has everything.

    Args:
        model: the module that is trained, or a sequence of them. Its forward, or that of its children and theirs
            where they are called by themselves, is "encoder forward", target network and projector included. Losses
            in it are found: the package's methods, PyTorch's losses, and modules of a class named ``...Loss``.
        optimizer: one, or a sequence, that is not a ``torch.optim.Optimizer``: those are found.
        loss: a loss module that is not part of ``model``, or a sequence of them. ``run.loss(function)`` wraps a
            function, and ``with run.part("loss")`` marks anything.
        ema: a module that averages and is not part of ``model``: a :class:`selfsup_kernels.EMA`, or any with
            ``update`` or ``update_parameters``. ``run.ema(function)`` wraps a function.
        out: a folder: ``report(out)`` is called at the end.
        device: where the model trains; None for the device of its first parameter. ``cpu`` and ``cuda``.
        warmup: steps before anything is measured.
        memory: measure the peak of each part. On CUDA this resets the allocator's peak statistics.
        trace: run one step under ``torch.profiler``.

    Returns:
        A context manager that gives a :class:`Run`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.
        RuntimeError: the model is being profiled already.
    """
    models = _modules("model", model)
    if not models:
        raise ValueError("model: expected at least one module, got none")
    device = torch.device(device) if device is not None else _device_of(models)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup: expected an integer >= 0, got {warmup!r}")
    others = [o for o in _sequence(optimizer) if not isinstance(o, torch.optim.Optimizer)]
    for other in others:
        if not callable(getattr(other, "step", None)):
            raise TypeError(f"optimizer: expected an optimizer, got {type(other).__name__}")
    return Run(models, _modules("loss", loss), others, _averages(ema), device, out, warmup, memory, trace)


class Run:
    """A profile in the making, and its results. Made by :func:`steps`.

    Attributes:
        device: where the model trains.
        counts: kind of steps -> how many have been run.
    """

    def __init__(self, models, losses, optimizers, averages, device, out, warmup, memory, trace):
        self._models, self._losses = models, list(dict.fromkeys([*losses, *hooks.losses_in(models)]))
        self._optimizers = optimizers
        self._averages, self._averaging = hooks.averages_in(models), averages
        self.device, self._out, self._warmup = device, out, warmup
        self._with = [kind for kind, wanted in ((MEMORY, memory), (TRACED, trace)) if wanted]
        self._cuda = device.type == "cuda"
        self._clock = CUDAClock(self.device) if self._cuda else CPUClock()
        self.counts = dict.fromkeys((WARMUP, TIMED, PLAIN, MEMORY, TRACED), 0)
        self._kind = self._recorder = self._hooks = self._trace = None
        self._waiting, self._seconds, self._plain = [], [], []
        self._peaks, self._level, self._folder = None, None, None
        self._marked = set()
        self._problems = []
        self._entered = False
        self._iterator = None

    def __enter__(self):
        if self._entered:
            raise RuntimeError("profile.steps: a run can be entered once; call steps() again")
        self._entered = True
        with contextlib.ExitStack() as stack:
            stack.enter_context(hooks.claimed(self._models))
            self._temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._level = memory.resting(self.device)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, *exception):
        self._abandon()
        self._iterator = None
        if self._cuda:
            torch.cuda.synchronize(self.device)
        self._collect(everything=True)
        with self._stack:
            traced = self._temporary / "trace.json"
            self._timeline = memory.timeline(traced, self._cuda) if traced.exists() else None
            # The report may be asked for later: the trace outlives the block that it was made in.
            kept = tempfile.TemporaryDirectory()
            shutil.copytree(self._temporary, kept.name, dirs_exist_ok=True)
            self._kept = kept
        if kind is None and self._out is not None:
            self.report(self._out)

    def __call__(self, loader: Iterable, *, accumulate: int = 1) -> Iterator:
        """Iterate over ``loader``, each ``accumulate`` batches of which are one step.

        May be called again, for a further epoch.

        Raises:
            RuntimeError: outside of the ``with`` block, or inside another such loop.
        """
        if not self._entered or self._level_closed():
            raise RuntimeError("profile.steps: expected run(loader) inside its with block")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate: expected an integer >= 1, got {accumulate!r}")
        if self._iterator is not None and self._iterator.running:
            # A loop that was left by break is over; nobody can ask it for more while this one runs.
            self._abandon()
        self._iterator = _Batches(self, loader, accumulate)
        return self._iterator

    def part(self, name):
        """A context manager: what runs in it is the part ``name``, such as "loss", "ema" or "encoder"."""
        name = parts.OWN_NAMES.get(name, name)
        if name not in parts.PARTS:
            raise ValueError(f"name: expected one of {', '.join([*parts.OWN_NAMES, *parts.PARTS])}, got {name!r}")
        return self._inside(name)

    @contextlib.contextmanager
    def _inside(self, name):
        self._marked.add(name)
        recorder = self._recorder if self._kind != PLAIN else None
        entered = recorder is not None and recorder.enter(name)
        try:
            yield
        finally:
            if entered:
                recorder.leave()

    def loss(self, function):
        """``function``, whose calls are the loss."""
        return self._wrapped(function, parts.LOSS_FORWARD)

    def ema(self, function):
        """``function``, whose calls update a moving average."""
        return self._wrapped(function, parts.EMA)

    def _wrapped(self, function, part):
        if not callable(function):
            raise TypeError(f"function: expected a function or a module, got {type(function).__name__}")

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            with self._inside(part):
                return function(*args, **kwargs)

        self._marked.add(part)
        return wrapper

    @property
    def summary(self) -> dict:
        """Times, peaks and what to know of them; see ``docs/profile.md``."""
        if not self._level_closed():
            raise RuntimeError("profile.steps: expected the end of the with block before the summary is read")
        known = bool(self._losses or hooks.own_losses(self._models) or parts.LOSS_FORWARD in self._marked)
        hidden = hooks.compiled_in(self._models)
        return summarize(
            device=str(self.device),
            counts=self.counts,
            timed=self._seconds,
            plain=self._plain,
            peaks=self._peaks,
            level=self._level,
            timeline=self._timeline,
            problems=self._problems,
            loss_known=known,
            hidden=hidden,
            with_memory=MEMORY in self._with,
        )

    def report(self, out):
        """Write ``report.html``, ``profile.json`` and the trace into the folder ``out``; needs the extra ``report``."""
        from selfsup_kernels.lab.profile import report

        self.save_trace(out)
        return report.write_run(self.summary, out)

    def save_trace(self, out):
        """Copy ``trace.json`` (on CUDA also ``snapshot.pickle``) to ``out``."""
        summary = self.summary  # refuses too early a call
        Path(out).mkdir(parents=True, exist_ok=True)
        for file in Path(self._kept.name).iterdir():
            shutil.copy(file, out)
        return summary

    def __str__(self):
        return text(self.summary) if self._level_closed() else "profile.steps: running"

    def _level_closed(self):
        return hasattr(self, "_kept")

    # One step after the other: _Batches calls these.

    def _next_kind(self) -> str:
        done = sum(self.counts.values()) - self.counts[WARMUP]
        if self.counts[WARMUP] < self._warmup:
            return WARMUP
        missing = [kind for kind in self._with if not self.counts[kind]]
        if done >= 3 and missing:
            return missing[0]
        # By turns in the order of A B B A, which a steady drift of the machine does not tell apart.
        turn = (self.counts[TIMED] + self.counts[PLAIN]) % 4
        return TIMED if turn in (0, 3) else PLAIN

    def _begin(self):
        self._kind = self._next_kind()
        if self._kind == WARMUP:
            return
        if self._kind == PLAIN:
            self._recorder = Recorder(self._clock)
            self._recorder.begin()
            return
        sampler = memory.sampler(self.device) if self._kind == MEMORY else None
        recorder = Recorder(self._clock, Ranges(self._cuda), sampler)
        self._hooks = contextlib.ExitStack()
        hooks.attach(
            self._hooks, recorder, self._models, self._losses, self._optimizers, self._averages, self._averaging
        )
        if self._kind == TRACED:
            self._trace = memory.Trace(self.device, self._temporary)
            self._trace.begin()
        recorder.begin()
        self._recorder = recorder

    def _end(self):
        """The step that runs is over."""
        kind, recorder = self._kind, self._recorder
        if recorder is not None:
            recorder.end()
        self._detach()
        if kind == TRACED:
            self._trace.end()
            self._problems += [self._trace.problem] if self._trace.problem else []
            self._trace = None
        elif kind == MEMORY:
            self._peaks = dict(recorder.memory.peaks) if recorder.memory else None
        elif kind in (TIMED, PLAIN):
            self._waiting.append((kind, recorder))
            self._collect()
        self.counts[kind] += 1
        self._kind = None

    def _abandon(self):
        """A step that was broken off counts for nothing, and leaves nothing behind."""
        if self._recorder is not None:
            self._recorder.abandon()
        self._detach()
        if self._trace is not None:
            self._trace.abandon()
            self._trace = None
        self._kind = None

    def _detach(self):
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = self._recorder = None

    def _collect(self, everything=False):
        """Read the marks of steps that the device has finished."""
        while self._waiting and (everything or self._clock.passed(self._waiting[0][1].marks[-1][0])):
            kind, recorder = self._waiting.pop(0)
            seconds = recorder.seconds()
            if kind == TIMED:
                self._seconds.append(seconds)
            else:
                self._plain.append(sum(seconds.values()))


class _Batches:
    """The loader's batches; asking for one ends the step before."""

    def __init__(self, run, loader, accumulate):
        self.run, self.loader, self.accumulate = run, loader, accumulate
        self.batches, self.taken, self.running = None, 0, True

    def __iter__(self):
        return self

    def __next__(self):
        run = self.run
        if not self.running:
            raise StopIteration
        new = self.taken % self.accumulate == 0
        if new:
            if self.taken:
                run._end()
            run._begin()
        elif run._recorder is not None:
            run._recorder.data_is_wanted()
        try:
            if self.batches is None:  # workers of a DataLoader start here: that is time for data
                self.batches = iter(self.loader)
            batch = next(self.batches)
        except BaseException:
            run._abandon()
            self.running = False
            raise
        if run._recorder is not None:
            run._recorder.data_has_come()
        self.taken += 1
        return batch


def _sequence(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _modules(name, value) -> list[nn.Module]:
    for module in _sequence(value):
        if not isinstance(module, nn.Module):
            hint = "; run.loss(function) wraps a function" if name == "loss" and callable(module) else ""
            raise TypeError(f"{name}: expected an nn.Module or a sequence of them, got {type(module).__name__}{hint}")
    return _sequence(value)


def _averages(value) -> list:
    found = []
    for module in _sequence(value):
        names = [n for n in ("update", "update_parameters") if callable(getattr(module, n, None))]
        if not names:
            raise TypeError(f"ema: expected a module with update(), got {type(module).__name__}")
        found.append((module, names[0]))
    return found


def _device_of(models) -> torch.device:
    return next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
