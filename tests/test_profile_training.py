"""profile.steps around a training loop: training is what it was, and nothing is left behind; memory and traces."""

import json
from itertools import pairwise

import pytest
import torch
from profile_cases import COSTS, METHODS, batches, loop, method_of, setup
from torch import nn
from torch.optim import optimizer as optimizers

import selfsup_kernels as sk
from selfsup_kernels.lab.profile import hooks, parts


@pytest.mark.parametrize("name", METHODS)
def test_training_is_bit_identical_and_nothing_is_left(name):
    torch.manual_seed(3)
    plain = method_of(name)
    expected = loop(plain, 9)
    method = method_of(name)
    before = attributes(method)
    with sk.profile.steps(method) as run:
        values, state = loop(method, 9, run)
    assert values == expected[0]
    assert list(state) == list(expected[1])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), expected[1].values(), strict=True))
    assert attributes(method) == before
    shares = {row["part"]: row["share"] for row in run.summary["parts"]}
    for part in ("encoder forward", "loss forward", "loss backward", "encoder backward", "optimizer"):
        assert shares[part] > 0, part
    assert (shares["EMA"] > 0) == hasattr(method, "update_target")


def attributes(module):
    """What a hook or a wrapper would change."""
    state = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for name, m in module.named_modules()
    ]
    patched = (
        torch.autograd.backward,
        torch.optim.Optimizer.zero_grad,
        torch.amp.GradScaler.step,
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
    )
    return state, patched


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
    with torch.profiler.profile(), sk.profile.steps(model, loss=criterion) as run:  # the profiler is free again
        pass


def test_used_again_nested_and_out_of_place():
    model, criterion, _ = setup(dict.fromkeys(COSTS, 0.0))
    run = sk.profile.steps(model, loss=criterion)
    with pytest.raises(RuntimeError, match="inside its with block"):
        run([1])
    with pytest.raises(RuntimeError, match="expected the end of the with block"):
        _ = run.summary
    with run:
        with pytest.raises(RuntimeError, match="this Encoder is being profiled already"), sk.profile.steps(model):
            pass
        for _ in range(2):  # two epochs
            for x in run(batches(4)):
                criterion(model(x)).backward()
        for _ in run(batches(4)):
            break
    assert sum(run.summary["steps"].values()) == 8
    with pytest.raises(RuntimeError, match="entered once"):
        run.__enter__()
    with pytest.raises(RuntimeError, match="inside its with block"):
        run([1])
    with sk.profile.steps(model):
        pass


def test_bad_arguments():
    model = nn.Linear(2, 2)
    for error, match, options in (
        (TypeError, "model: expected an nn.Module", {"model": 3}),
        (ValueError, "model: expected at least one", {"model": []}),
        (TypeError, r"loss: expected .* run.loss\(function\)", {"loss": torch.nn.functional.mse_loss}),
        (TypeError, "ema: expected a module with update", {"ema": model}),
        (TypeError, "optimizer: expected an optimizer, got int", {"optimizer": 1}),
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
        with pytest.raises(TypeError, match="function: expected a function"):
            run.loss(3)


def test_compiled_encoders_keep_their_loss_apart():
    for how in ("wrapped", "in place"):
        torch._dynamo.reset()
        encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        if how == "wrapped":
            encoder = torch.compile(encoder, backend="aot_eager")
        method = method_of("simclr", encoder)
        if how == "in place":
            encoder.compile(backend="aot_eager")
        with sk.profile.steps(method, memory=False) as run:
            loop(method, 8, run)
        shares = {row["part"]: row["share"] for row in run.summary["parts"]}
        assert all(shares[p] > 0 for p in ("encoder forward", *parts.LOSS, "encoder backward"))
        assert not any("compiled together" in line for line in run.summary["warnings"])
    torch._dynamo.reset()


def test_a_loss_compiled_with_its_encoder_is_said_to_be():
    torch._dynamo.reset()
    method = torch.compile(method_of("simclr"), backend="eager")
    assert hooks.losses_in([method]) == []
    with sk.profile.steps(method, memory=False, trace=False) as run:
        loop(method, 6, run)
    assert "InfoNCELoss: compiled together with the encoder" in run.summary["warnings"][0]
    torch._dynamo.reset()


def test_peak_memory_by_part():
    class Wide(nn.Module):
        def forward(self, x):
            return x.expand(32 << 20).clone()[:4] + x

    model, criterion = nn.Sequential(nn.Linear(1, 1)), Wide()
    # Freed, but below the top of the heap, so that the C library keeps it: no part's peak may come out lower for it.
    left = [bytearray(100_000) for _ in range(600)]
    pin = bytearray(100_000)
    del left
    with sk.profile.steps(model, loss=criterion, trace=False) as run:
        for _ in run(range(7)):
            criterion(model(torch.ones(1))).sum().backward()
    peaks = {row["part"]: row["peak_bytes"] for row in run.summary["parts"]}
    if run.summary["peak_bytes"] is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert len(pin)
    assert 120e6 < peaks["loss forward"] < 250e6
    assert peaks["data"] < 60e6
    assert peaks["encoder forward"] < 60e6
    assert run.summary["peak_bytes"] == max(v for v in peaks.values() if v is not None)


def test_trace_has_the_ranges_and_the_timeline_the_memory(tmp_path):
    method = method_of("byol", nn.Sequential(nn.Linear(8, 1 << 16), nn.Linear(1 << 16, 8)))
    with sk.profile.steps(method, memory=False) as run:
        loop(method, 7, run)
    run.save_trace(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {f"selfsup_kernels: {part}" for part in parts.NAMED} <= names
    line = run.summary["timeline"]
    assert len(line["seconds"]) == len(line["bytes"]) > 10
    # Sixteen rows of 2 ** 16 numbers, two views, and as much again for the target at a time.
    assert 2 * 16 * 4 * 2**16 <= max(line["bytes"]) < 64 * 4 * 16 * 2**16
    spans = line["spans"]
    assert next(name for name, *_ in spans) == "data"
    assert all(begin <= end for _, begin, end in spans)
    assert all(a[2] <= b[1] + 1e-4 for a, b in pairwise(spans))
    order = [name for name, *_ in spans if name not in ("other", "data")]
    assert order.index("loss forward") < order.index("loss backward") < order.index("EMA")


def test_a_users_own_profiler_shows_the_ranges():
    model, criterion, _ = setup(dict.fromkeys(COSTS, 0.0))
    with sk.profile.steps(model, loss=criterion) as run, torch.profiler.profile() as profiler:
        for x in run(batches(9)):
            criterion(model(x)).backward()
    assert "selfsup_kernels: loss backward" in {event.key for event in profiler.key_averages()}
    assert any("no trace: another profiler" in line for line in run.summary["warnings"])
    assert run.summary["timeline"] is None
