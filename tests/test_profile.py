"""profile.steps: what each part of a step takes, and what the summary says of it."""

import contextlib
import threading
import time

import pytest
import torch
from profile_cases import (
    COSTS,
    METHODS,
    TICK,
    Encoder,
    Optimizer,
    SquareLoss,
    batches,
    close,
    loop,
    method_of,
    seconds,
    setup,
)
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.lab.profile import PARTS, parts
from selfsup_kernels.lab.profile.summary import faster, size, summarize


def test_every_part_is_told_apart_and_they_add_up(counted_time):
    costs = {part: 2.5 * cost for part, cost in COSTS.items()}
    model, criterion, optimizer = setup(costs)
    average = sk.EMA(model, 0.9)
    slow_average(average, costs["EMA"])
    with sk.profile.steps(model, loss=criterion, ema=average) as run:
        for x in run(batches(14, costs["data"])):
            criterion(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update()
    measured = seconds(run)
    close(measured, costs)
    close(measured, {"other": 0})
    s = run.summary
    assert s["step_seconds"] == pytest.approx(sum(costs.values()), abs=2 * TICK)
    assert s["difference"] == s["named_seconds"] / s["step_seconds"] - 1
    assert sum(measured.values()) == pytest.approx(s["marked_step_seconds"])
    assert not s["warnings"]
    assert s["steps"] == {"warmup": 2, "timed": 5, "plain": 5, "memory": 1, "traced": 1}
    assert s["loss_share"] == pytest.approx(sum(measured[p] for p in parts.LOSS) / s["marked_step_seconds"])


def test_on_the_cpu_seconds_are_real():
    """Sleeps last at least as long as they say; how much longer is the machine's."""
    model, criterion, optimizer = setup()
    begin = time.perf_counter()
    with sk.profile.steps(model, loss=criterion, memory=False, trace=False) as run:
        for x in run(batches(6, COSTS["data"])):
            criterion(model(x)).backward()
            optimizer.step()
    measured = seconds(run)
    assert all(0.98 * cost <= measured[part] for part, cost in COSTS.items() if part != "EMA")
    assert 2 * run.summary["marked_step_seconds"] + 2 * run.summary["step_seconds"] < time.perf_counter() - begin


def slow_average(average, cost):
    inner = average.update

    def update(momentum=None):
        time.sleep(cost)
        inner(momentum)

    average.update = update


def test_a_sum_that_is_off_is_said_to_be():
    values = dict.fromkeys(PARTS, 0.1)
    facts = {"device": "cpu", "counts": {}, "peaks": None, "level": 0, "timeline": None, "problems": [], "hidden": []}
    facts["with_memory"] = False
    right = summarize(timed=[values], plain=[0.7], loss_known=True, **facts)
    assert right["difference"] == pytest.approx(0)
    assert not right["warnings"]
    wrong = summarize(timed=[values], plain=[1.0], loss_known=True, **facts)
    assert wrong["difference"] == pytest.approx(-0.3)
    assert "make up 70 % of a step without marks" in wrong["warnings"][0]
    unknown = summarize(timed=[values], plain=[0.7], loss_known=False, **facts)
    assert unknown["loss_share"] is None
    assert "No loss was found" in unknown["warnings"][0]


def test_accumulated_batches_are_one_step(counted_time):
    model, criterion, optimizer = setup()
    with sk.profile.steps(model, loss=criterion, memory=False, trace=False) as run:
        for i, x in enumerate(run(batches(12, COSTS["data"]), accumulate=2)):
            (criterion(model(x)) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    once = ("optimizer", "EMA")
    close(seconds(run), {p: COSTS[p] if p in once else 2 * COSTS[p] for p in COSTS if p != "EMA"})
    assert run.summary["steps"] == {"warmup": 2, "timed": 2, "plain": 2, "memory": 0, "traced": 0}


@pytest.mark.parametrize("together", [True, False])
def test_two_losses_one_of_them_in_the_middle(together, counted_time):
    first, second = Encoder(0.004, 0.008), Encoder(0.006, 0.012)
    near, far = SquareLoss(0.002, 0.01), SquareLoss(0.003, 0.014)
    with sk.profile.steps([first, second], loss=[near, far], memory=False, trace=False) as run:
        for x in run(batches(7)):
            middle = first(x)
            early = 0.5 * near(middle)
            late = far(second(middle))
            if together:
                (early + late).backward()
            else:
                late.backward(retain_graph=True)
                early.backward()
    costs = {"loss forward": 0.005, "loss backward": 0.024, "encoder forward": 0.01, "encoder backward": 0.02}
    if not together:
        costs["encoder backward"] += 0.008
    close(seconds(run), costs)


def test_a_loss_that_is_a_function_and_one_that_is_only_marked(counted_time):
    model = Encoder(0.006, 0.012)
    slow = SquareLoss(0.008, 0.016)
    for kind in ("function", "part"):
        with sk.profile.steps(model, memory=False, trace=False) as run:
            function = run.loss(lambda x: slow(x))
            for x in run(batches(6)):
                z = model(x)
                if kind == "function":
                    value = function(z)
                else:
                    with run.part("loss"):
                        value = slow(z)
                value.backward()
        close(
            seconds(run),
            {"encoder forward": 0.006, "loss forward": 0.008, "loss backward": 0.016, "encoder backward": 0.012},
        )


def test_what_a_loss_calls_is_the_loss(counted_time):
    """Also a module that is profiled by itself."""
    model, scale = Encoder(0.006, 0.012), Encoder(0.002, 0.004)
    square = SquareLoss(0.008, 0.016)

    class Scaled(nn.Module):
        def forward(self, z):
            return square(scale(z))

    criterion = Scaled()
    with sk.profile.steps([model, scale], loss=criterion, memory=False, trace=False) as run:
        for x in run(batches(6)):
            criterion(model(x)).backward()
    close(
        seconds(run),
        {"encoder forward": 0.006, "loss forward": 0.01, "loss backward": 0.02, "encoder backward": 0.012},
    )


def test_averages_of_any_kind(counted_time):
    model, criterion, _ = setup(dict.fromkeys(COSTS, 0.0))
    average = torch.optim.swa_utils.AveragedModel(model)
    with sk.profile.steps(model, loss=criterion, ema=average, memory=False, trace=False) as run:
        other = run.ema(lambda: time.sleep(0.005))
        for x in run(batches(6)):
            criterion(model(x)).backward()
            average.update_parameters(model)
            other()
            with run.part("ema"):
                time.sleep(0.005)
    close(seconds(run), {"EMA": 0.01})
    assert "update_parameters" not in vars(average)


def test_a_loop_without_a_loss_says_so():
    model = nn.Linear(4, 4)
    with sk.profile.steps(model) as run:
        for x in run(batches(8)):
            model(x).square().mean().backward()
    assert run.summary["loss_share"] is None
    assert "No loss was found" in str(run)
    assert seconds(run)["loss backward"] == 0


def test_a_short_loop_says_what_is_missing():
    model = nn.Linear(4, 4)
    with sk.profile.steps(model, loss=nn.MSELoss()) as run:
        for x in run(batches(3)):
            model(x).mean().backward()
    assert run.summary["steps"]["timed"] == 1
    assert "without marks" in run.summary["warnings"][0]
    with sk.profile.steps(model, warmup=2) as run:
        for _ in run(batches(1)):
            pass
    assert "shorter than its warm-up" in run.summary["warnings"][0]
    assert run.summary["step_seconds"] is None
    assert "-" in str(run)


@pytest.mark.parametrize("name", METHODS)
def test_methods_need_no_help(name, counted_time):
    """The encoder's sleep is not in the loss, and the loss is not in the encoder."""
    method = method_of(name, nn.Sequential(nn.Linear(8, 4), Encoder(0.003, 0.006), nn.Linear(4, 8)))
    with sk.profile.steps(method, memory=False, trace=False) as run:
        loop(method, 6, run)
    measured = seconds(run)
    calls = {"simclr": (2, 2), "cmc": (2, 2), "moco": (2, 1), "byol": (4, 2), "fusion": (4, 2)}[name]
    close(measured, {"encoder forward": 0.003 * calls[0], "encoder backward": 0.006 * calls[1]})
    close(measured, {"loss forward": 0, "loss backward": 0})
    assert not run.summary["warnings"]


def test_an_exception_inside_a_module_that_is_caught(counted_time):
    class Fails(nn.Linear):
        fail = False

        def forward(self, x):
            if self.fail:
                raise ValueError("now")
            return super().forward(x)

    model, criterion = Fails(4, 4), SquareLoss()
    with sk.profile.steps(model, loss=criterion, warmup=0, memory=False, trace=False) as run:
        for i, x in enumerate(run(batches(8))):
            model.fail = i % 2 == 0
            with contextlib.suppress(ValueError):
                criterion(model(x)).backward()
            time.sleep(0.002)
    close(seconds(run), {"other": 0.002, "encoder forward": 0})


def test_gradient_scaler_autocast_and_checkpointing(counted_time):
    model, criterion = Encoder(0.004, 0.008), SquareLoss(0.005, 0.01)
    optimizer = Optimizer(model.parameters(), 1e-3)
    optimizer.seconds = 0.004
    scaler = torch.amp.GradScaler("cpu")
    with sk.profile.steps(model, loss=criterion, memory=False, trace=False) as run:
        for x in run(batches(6)):
            with torch.autocast("cpu", torch.bfloat16):
                z = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
                value = criterion(z)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    close(
        seconds(run),
        {
            "encoder forward": 0.004,
            "loss forward": 0.005,
            "loss backward": 0.01,
            "encoder backward": 0.012,  # with the forward again
            "optimizer": 0.004,
        },
    )


def test_chunked_backward(counted_time):
    encoder, criterion = Encoder(0.002, 0.004), sk.InfoNCELoss()
    with sk.profile.steps(encoder, loss=criterion, memory=False, trace=False) as run:
        for x in run(batches(6)):
            x = x + torch.arange(3.0).unsqueeze(1)
            sk.chunked_backward(encoder, [x, 2 * x - 1], criterion, chunk_size=2)
    # Four chunks: each twice forward, once backward.
    close(seconds(run), {"encoder forward": 0.016, "encoder backward": 0.016})


def test_calls_in_other_threads_do_not_disturb(counted_time):
    model, criterion = Encoder(0.002, 0.002), SquareLoss()
    spoiler = Encoder(0.03, 0.0)
    with sk.profile.steps([model, spoiler], loss=criterion, memory=False, trace=False) as run:
        for x in run(batches(6)):
            thread = threading.Thread(target=spoiler, args=(x,))
            thread.start()
            thread.join()
            criterion(model(x)).backward()
    close(seconds(run), {"other": 0.03, "encoder forward": 0.002, "encoder backward": 0.002})


def test_words_and_numbers():
    assert [size(n) for n in (None, 12, 1500, 2_340_000, 9.996e8, 12.34e9)] == [
        "-",
        "12 B",
        "1.5 kB",
        "2.34 MB",
        "1 GB",
        "12.3 GB",
    ]
    assert faster([5, 1, 9, 2, 8]) == [1, 2, 5]
    assert faster([3]) == [3]
