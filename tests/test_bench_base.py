"""``bench --base``: the verdict on times that are made up, and the whole of it on versions that are made up."""

import json
import random
import subprocess

import pytest

from selfsup_kernels.bench import base, verdict


def launches(ratio, noise, bias=0.0, seed=0, turns=15, count=3):
    """Turns of (base, base, candidate): ``noise`` from turn to turn, ``bias`` from process to process."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        own = [1 + bias * draw.uniform(-1, 1) for _ in range(3)]
        own[2] *= ratio
        made.append([tuple(x * (1 + abs(draw.gauss(0, noise))) for x in own) for _ in range(turns)])
    return made


def verdicts(count=200, **arguments):
    return [verdict.judge(launches(seed=seed, **arguments))["verdict"] for seed in range(count)]


@pytest.mark.parametrize(("noise", "bias"), [(0.0, 0.0), (0.02, 0.0), (0.3, 0.0), (0.02, 0.1)])
def test_equals_are_not_flagged(noise, bias):
    assert verdicts(ratio=1.0, noise=noise, bias=bias).count("same") >= 198


@pytest.mark.parametrize(("ratio", "expected"), [(1.15, "slower"), (0.85, "faster")])
def test_differences_are_flagged(ratio, expected):
    found = verdicts(ratio=ratio, noise=0.02, bias=0.01)
    assert found.count(expected) >= 195
    assert set(found) <= {expected, "same"}


def test_small_differences_and_those_within_the_noise_are_not():
    assert verdicts(ratio=1.015, noise=0.0).count("same") == 200
    assert verdicts(ratio=1.1, noise=0.02, bias=0.2).count("slower") < 20


def test_one_disturbed_launch_is_no_verdict():
    made = launches(1.0, 0.01)
    made[1] = [(a, b, 2 * c) for a, b, c in made[1]]
    judged = verdict.judge(made)
    assert judged["verdict"] == "same"
    assert judged["ratio"] == pytest.approx(1, abs=0.02)


def test_ratio_and_noise():
    turns = [(1.0, 1.1, 2.0)] * 5
    judged = verdict.judge([turns] * 3)
    assert judged["ratio"] == pytest.approx(2 / 1.1**0.5)
    assert judged["noise"] == pytest.approx(0.1)
    assert judged["verdict"] == "slower"
