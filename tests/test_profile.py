"""profile.steps: what each part of a step takes, and that the training is what it was without it."""

import contextlib
import json
import threading
import time

import pytest
import torch
from profile_cases import COSTS, TICK, Encoder, SquareLoss, batches, close, loop, method_of, seconds, setup
from torch import nn
from torch.optim import optimizer as optimizers

import selfsup_kernels as sk
from selfsup_kernels.lab.profile import PARTS, memory, parts, report
from selfsup_kernels.lab.profile.summary import faster, own_case, size, summarize
from selfsup_kernels.lab.profile.workload import METHODS

QUIET = {"memory": False, "trace": False}


def slow(function, cost):
    def wrapper(*args):
        time.sleep(cost)
        return function(*args)

    return wrapper


def test_every_part_is_told_apart_and_they_add_up(counted_time):
    model, criterion, optimizer = setup()
    average = sk.EMA(model, 0.9)
    average.update = slow(average.update, COSTS["EMA"])
    with sk.profile.steps(model, loss=criterion, ema=average) as run:
        for x in run(batches(14, COSTS["data"])):
            criterion(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update()
    measured, s = seconds(run), run.summary
    close(measured, COSTS | {"other": 0})
    assert s["step_seconds"] == pytest.approx(sum(COSTS.values()), abs=3 * TICK)
    assert s["difference"] == s["named_seconds"] / s["step_seconds"] - 1
    assert sum(measured.values()) == pytest.approx(s["marked_step_seconds"])
    assert not s["warnings"]
    assert s["steps"] == {"warmup": 2, "timed": 5, "plain": 6, "memory": 0, "traced": 1}
    assert s["loss_share"] == pytest.approx(sum(measured[p] for p in parts.LOSS) / s["marked_step_seconds"])
    first = str(run).splitlines()[0]
    assert first == report.answer({"cases": [own_case(s)]})
    assert f"{s['loss_share']:.0%}".replace("%", " %") in first


def test_warnings_and_numbers():
    values = dict.fromkeys(PARTS, 0.1)
    facts = {"device": "cpu", "counts": {}, "peaks": None, "warnings": []}
    right = summarize(timed=[values], plain=[0.7], loss_known=True, **facts)
    assert right["difference"] == pytest.approx(0)
    assert not right["warnings"]
    wrong = summarize(timed=[values], plain=[1.0], loss_known=True, **facts)
    assert wrong["difference"] == pytest.approx(-0.3)
    assert "make up 70 % of a step without marks" in wrong["warnings"][0]
    told = {None: "-", 12: "12 B", 1500: "1.5 kB", 2_340_000: "2.34 MB", 9.996e8: "1 GB", 12.34e9: "12.3 GB"}
    assert {n: size(n) for n in told} == told
    assert faster([5, 1, 9, 2, 8]) == [1, 2, 5]


def test_accumulated_batches_are_one_step(counted_time):
    model, criterion, optimizer = setup()
    with sk.profile.steps(model, loss=criterion, **QUIET) as run:
        for i, x in enumerate(run(batches(12, COSTS["data"]), accumulate=2)):
            (criterion(model(x)) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    close(seconds(run), {p: cost * (1 if p == "optimizer" else 2) for p, cost in COSTS.items() if p != "EMA"})
    assert run.summary["steps"] == {"warmup": 2, "timed": 2, "plain": 2, "memory": 0, "traced": 0}


@pytest.mark.parametrize("together", [True, False])
def test_two_losses_one_of_them_in_the_middle(together, counted_time):
    first, second = Encoder(0.004, 0.008), Encoder(0.006, 0.012)
    near, far = SquareLoss(0.002, 0.01), SquareLoss(0.003, 0.014)
    with sk.profile.steps([first, second], loss=[near, far], **QUIET) as run:
        for x in run(batches(7)):
            middle = first(x)
            early, late = 0.5 * near(middle), far(second(middle))
            if together:
                (early + late).backward()
            else:  # a retained graph goes backward twice
                late.backward(retain_graph=True)
                early.backward()
    costs = {"loss forward": 0.005, "loss backward": 0.024, "encoder forward": 0.01, "encoder backward": 0.02}
    close(seconds(run), costs | ({} if together else {"encoder backward": 0.028}))


@pytest.mark.parametrize("kind", ["module", "function", "part"])
def test_losses_of_any_kind_and_what_they_call(kind, counted_time):
    model, scale = Encoder(0.006, 0.012), Encoder(0.002, 0.004)
    criterion = nn.Sequential(scale, SquareLoss(0.008, 0.016))
    given = {"loss": criterion} if kind == "module" else {}
    with sk.profile.steps([model, scale], **given, **QUIET) as run:
        function = run.loss(lambda z: criterion(z)) if kind == "function" else criterion
        for x in run(batches(6)):
            z = model(x)
            with run.part("loss") if kind == "part" else contextlib.nullcontext():
                value = function(z)
            value.backward()
    costs = {"encoder forward": 0.006, "loss forward": 0.01, "loss backward": 0.02, "encoder backward": 0.012}
    close(seconds(run), costs)
    assert not run.summary["warnings"]


def test_averages_and_optimizers_of_any_kind(counted_time):
    model, criterion, optimizer = Encoder(), SquareLoss(), Encoder()
    optimizer.step = lambda: time.sleep(0.003)  # no torch.optim.Optimizer
    average = torch.optim.swa_utils.AveragedModel(model)
    with sk.profile.steps(model, loss=criterion, ema=average, optimizer=optimizer, **QUIET) as run:
        other = run.ema(lambda: time.sleep(0.005))
        for x in run(batches(6)):
            criterion(model(x)).backward()
            optimizer.step()
            average.update_parameters(model)
            other()
            with run.part("ema"):
                time.sleep(0.005)
    close(seconds(run), {"EMA": 0.01, "optimizer": 0.003})
    assert "update_parameters" not in vars(average)


def test_loops_without_a_loss_and_short_ones_say_so():
    model = nn.Linear(4, 4)
    for count, words in ((8, "No loss was found"), (3, "too short"), (1, "too short")):
        with sk.profile.steps(model) as run:
            for x in run(batches(count)):
                model(x).square().mean().backward()
        assert words in str(run)
        assert run.summary["loss_share"] is None
        assert seconds(run)["loss backward"] == (None if count == 1 else 0)


def test_a_loader_that_was_not_wrapped():
    with sk.profile.steps(nn.Linear(4, 4), loss=SquareLoss()) as run:
        pass
    first, *rest = str(run).splitlines()
    assert first.endswith("run(loader) was never iterated).")
    assert rest == ["warning: run(loader) was never iterated: write `for batch in run(loader):`."]


@pytest.mark.parametrize("name", METHODS)
def test_methods_need_no_help(name, counted_time):
    """The encoder's sleep is not in the loss, and the loss is not in the encoder."""
    method = method_of(name, nn.Sequential(nn.Linear(8, 4), Encoder(0.003, 0.006), nn.Linear(4, 8)))
    with sk.profile.steps(method, **QUIET) as run:
        loop(method, 6, run)
    calls = {"moco": (2, 1), "byol": (4, 2), "byol_contrast": (4, 2)}.get(name, (2, 2))
    close(seconds(run), {"encoder forward": 0.003 * calls[0], "encoder backward": 0.006 * calls[1]})
    close(seconds(run), {"loss forward": 0, "loss backward": 0})
    assert not run.summary["warnings"]


def test_gradient_scaler_autocast_and_checkpointing(counted_time):
    costs = {"encoder forward": 0.004, "loss forward": 0.005, "loss backward": 0.01, "optimizer": 0.004}
    model, criterion, optimizer = setup(costs | {"encoder backward": 0.008})
    scaler = torch.amp.GradScaler("cpu")
    with sk.profile.steps(model, loss=criterion, **QUIET) as run:
        for x in run(batches(6)):
            with torch.autocast("cpu", torch.bfloat16):
                value = criterion(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    close(seconds(run), costs | {"encoder backward": 0.012})  # with the forward again


def test_chunked_backward(counted_time):
    encoder, criterion = Encoder(0.002, 0.004), sk.InfoNCELoss()
    with sk.profile.steps(encoder, loss=criterion, **QUIET) as run:
        for x in run(batches(6)):
            x = x + torch.arange(3.0).unsqueeze(1)
            sk.chunked_backward(encoder, [x, 2 * x - 1], criterion, chunk_size=2)
    # Four chunks: each twice forward, once backward.
    close(seconds(run), {"encoder forward": 0.016, "encoder backward": 0.016})


def test_calls_in_other_threads_do_not_disturb(counted_time):
    model, criterion, other = Encoder(0.002, 0.002), SquareLoss(), Encoder(0.03, 0.0)
    with sk.profile.steps([model, other], loss=criterion, **QUIET) as run:
        for x in run(batches(6)):
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()
            criterion(model(x)).backward()
    close(seconds(run), {"other": 0.03, "encoder forward": 0.002, "encoder backward": 0.002})


# The training is what it was


@pytest.mark.parametrize("name", METHODS)
def test_training_is_bit_identical_and_nothing_is_left(name):
    torch.manual_seed(3)
    expected = loop(method_of(name), 9)
    method = method_of(name)
    before = attributes(method)
    with sk.profile.steps(method) as run:
        values, state = loop(method, 9, run)
    assert values == expected[0]
    assert list(state) == list(expected[1])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), expected[1].values(), strict=True))
    assert attributes(method) == before
    shares = {row["part"]: row["share"] for row in run.summary["parts"]}
    assert all(shares[part] > 0 for part in parts.NAMED if part != parts.EMA)
    assert (shares["EMA"] > 0) == hasattr(method, "update_target")


def attributes(module):
    """Return all that a hook or a wrapper would change."""
    state = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in module.named_modules()]
    patched = torch.autograd.backward, torch.optim.Optimizer.zero_grad, torch.amp.GradScaler.step
    hooks = len(optimizers._global_optimizer_pre_hooks), len(optimizers._global_optimizer_post_hooks)
    return state, patched, hooks


def test_an_exception_leaves_nothing_behind():
    model, criterion, optimizer = setup(dict.fromkeys(COSTS, 0.0))
    before = attributes(model), attributes(criterion)

    def train(run, at):
        for i, x in enumerate(run(batches(9))):
            value = criterion(model(x))
            if i == at:
                raise ZeroDivisionError
            value.backward()
            optimizer.step()

    for at in range(8):
        with pytest.raises(ZeroDivisionError), sk.profile.steps(model, loss=criterion) as run:
            train(run, at)
        assert (attributes(model), attributes(criterion)) == before
        assert sum(run.summary["steps"].values()) == at
    with torch.profiler.profile():  # the profiler is free again
        pass


def test_used_again_and_out_of_place():
    model, criterion, _ = setup(dict.fromkeys(COSTS, 0.0))
    run = sk.profile.steps(model, loss=criterion)
    with pytest.raises(RuntimeError, match="inside its with block"):
        run([1])
    with pytest.raises(RuntimeError, match="expected the end of the with block"):
        _ = run.summary
    with run:
        for _ in range(2):  # two epochs
            for x in run(batches(4)):
                criterion(model(x)).backward()
        left = iter(run(batches(4)))
        next(left)
        for _ in run(batches(4)):
            left = None  # a loop that was left ends late
            break
    assert sum(run.summary["steps"].values()) == 8
    with pytest.raises(RuntimeError, match="entered once"):
        run.__enter__()
    with pytest.raises(RuntimeError, match="inside its with block"):
        run([1])


def test_bad_arguments():
    model = nn.Linear(2, 2)
    for error, match, options in (
        (TypeError, "model: expected an nn.Module", {"model": 3}),
        (ValueError, "model: expected at least one", {"model": []}),
        (TypeError, r"loss: expected .* run.loss\(function\)", {"loss": torch.nn.functional.mse_loss}),
        (TypeError, r"ema: expected an object with update\(\)", {"ema": model}),
        (TypeError, r"optimizer: expected an object with step\(\), got int", {"optimizer": 1}),
        (ValueError, "warmup: expected an integer >= 0, got -1", {"warmup": -1}),
        (ValueError, "device: expected cpu or cuda, got meta", {"device": "meta"}),
    ):
        with pytest.raises(error, match=match):
            sk.profile.steps(**({"model": model} | options))
    with sk.profile.steps(model) as run:
        with pytest.raises(ValueError, match="accumulate: expected an integer >= 1, got 0"):
            run([], accumulate=0)
        with pytest.raises(ValueError, match=r"name: expected one of loss, .* got 'nonsense'"):
            run.part("nonsense")


@pytest.mark.parametrize("how", ["wrapped", "in place", "with its loss"])
def test_compiled_encoders(how):
    torch._dynamo.reset()
    encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    method = method_of("simclr", torch.compile(encoder, backend="aot_eager") if how == "wrapped" else encoder)
    if how == "in place":
        encoder.compile(backend="aot_eager")
    if how == "with its loss":
        method = torch.compile(method, backend="eager")
    with sk.profile.steps(method, memory=False) as run:
        loop(method, 8, run)
    if how == "with its loss":
        assert "compiled together with the encoder" in run.summary["warnings"][0]
    else:
        shares = {row["part"]: row["share"] for row in run.summary["parts"]}
        assert all(shares[p] > 0 for p in ("encoder forward", *parts.LOSS, "encoder backward"))
    torch._dynamo.reset()


# Memory and traces


def test_peak_memory_by_part():
    class Wide(nn.Module):
        def forward(self, x):
            return x.expand(32 << 20).clone()[:4] + x

    model, criterion = nn.Sequential(nn.Linear(1, 1)), Wide()
    with sk.profile.steps(model, loss=criterion, trace=False) as run:
        for _ in run(range(7)):
            criterion(model(torch.ones(1))).sum().backward()
    peaks = {row["part"]: row["peak_bytes"] for row in run.summary["parts"]}
    assert 4 * 2**25 <= peaks["loss forward"] < 4.01 * 2**25
    assert max(peaks["data"], peaks["encoder forward"]) < 1e6
    assert run.summary["peak_bytes"] == max(v for v in peaks.values() if v is not None)


def test_the_trace_has_the_ranges(tmp_path):
    method = method_of("byol")
    with sk.profile.steps(method, memory=False) as run:
        loop(method, 7, run)
    run.save_trace(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {f"selfsup_kernels: {part}" for part in parts.NAMED} <= names


def test_a_users_own_profiler_shows_the_ranges():
    model, criterion, _ = setup(dict.fromkeys(COSTS, 0.0))
    with sk.profile.steps(model, loss=criterion) as run, torch.profiler.profile() as profiler:
        for x in run(batches(9)):
            criterion(model(x)).backward()
    assert "selfsup_kernels: loss backward" in {event.key for event in profiler.key_averages()}
    assert any("no trace: another profiler" in line for line in run.summary["warnings"])
    assert run.summary["peak_bytes"] is None


# CUDA: a backward in a thread of its own, events, the allocator's peaks


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)).cuda()
    criterion, optimizer = sk.InfoNCELoss(impl="reference"), torch.optim.SGD(model.parameters(), 0.01)
    with sk.profile.steps(model, loss=criterion) as run:
        for x in run([torch.randn(2, 256, 512) for _ in range(12)]):
            criterion([model(view) for view in x.cuda()]).backward()
            optimizer.step()
    told, s = run.save_trace(tmp_path), run.summary
    assert told["device"].startswith("cuda")
    assert all(row["seconds"] > 0 for row in s["parts"] if row["part"] != "EMA")
    assert sum(seconds(run).values()) == pytest.approx(s["marked_step_seconds"])
    peaks = {row["part"]: row["peak_bytes"] for row in s["parts"]}
    assert peaks["loss backward"] == peaks["encoder backward"] == s["peak_bytes"] > 4 * 512**2
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {f"selfsup_kernels: {name}" for name in ("data", "encoder forward", "loss forward", "backward")} <= names


def test_peaks_of_a_gpu(tmp_path):
    """Its memory events only; both parts of the backward have one range."""
    events = [
        {"name": f"selfsup_kernels: {name}", "cat": "user_annotation", "ts": ts, "dur": 9}
        for name, ts in (("loss forward", 0), ("backward", 10))
    ]
    for ts, total, change, kind in ((2, 150, 50, 1), (3, 9999, 9999, 0), (5, 130, -20, 1), (12, 190, 60, 1)):
        args = {"Total Allocated": total, "Bytes": change, "Device Type": kind}
        events.append({"name": "[memory]", "ph": "i", "ts": ts, "args": args})
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    peaks = memory.peaks(tmp_path / "trace.json", cuda=True)
    assert peaks == {"loss forward": 50, "loss backward": 90, "encoder backward": 90}
