"""The tuner, all but its clock: candidates, the compiler's veto, the choice, the table that is written."""

import contextlib
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton")

from selfsup_kernels.lab import machine_code, tune
from selfsup_kernels.tiles import configs

TABLE = json.loads(configs.TABLE.read_text())
SMALL = tune.Task("sums", "half", 64)


def shipped(task, architecture):
    return task.entry(TABLE, architecture)


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_candidates_suit_the_kernels(architecture):
    todo = tune.tasks(TABLE, architecture)
    assert {t.kernel for t in todo} <= set(tune.OPS)
    assert {t.base for t in todo} == {"sums", "gradient", "wave", "product"}
    for task in todo:
        first, *others = found = tune.candidates(task, architecture, shipped(task, architecture))
        assert first == shipped(task, architecture)
        assert 10 <= len(found) <= 120
        assert len(set(found)) == len(found)
        for c in others:
            assert max(c.block_m, c.block_n) <= 256  # what the rows are padded to
            assert not c.descriptor or architecture >= 90
            if task.base == "sums":
                assert c.block_n % c.block_m == 0
            else:
                assert c.programs == 1
            if task.base == "gradient":
                assert c.block_k >= task.dim


@pytest.mark.skipif(machine_code.available() is not None, reason="needs Triton's compiler, not its interpreter")
def test_what_spills_or_does_not_fit_is_not_measured():
    good = shipped(SMALL, 80)
    spills = configs.Config(128, 256, 64, 4, 2)
    too_large = configs.Config(128, 128, 64, 8, 12)
    crowded = configs.Config(128, 128, 64, 8, 3, programs=4)
    found = [good, spills, too_large, crowded]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        kept, dropped = tune.filter_candidates(SMALL, found, 80, pool)
    assert kept == [good]
    assert dropped == {"stack frame of N bytes": 1, "shared memory N KB of N": 1, "N programs do not fit": 1}


@pytest.fixture
def all_fit(monkeypatch):
    monkeypatch.setattr(tune, "filter_candidates", lambda task, found, *rest: (list(found), tune.Counter()))


def pretend(task, config, rows):
    """Fastest: the widest tile with four warps; slower with every stage."""
    if config.num_stages == 1:
        raise RuntimeError("out of resources")
    return rows / (config.block_m * config.block_n) * config.num_warps + config.num_stages


def test_the_fastest_is_chosen(all_fit):
    measured, dropped = tune.tune(SMALL, TABLE, 90, pretend)
    scores = [math.prod(pretend(SMALL, m.config, rows) for rows in SMALL.rows) for m in measured]
    assert scores == sorted(scores)
    assert shipped(SMALL, 90) in [m.config for m in measured]
    assert all(m.config.num_stages > 1 for m in measured)
    assert dropped["RuntimeError"] > 0  # a launch that was refused is counted, and ends nothing


def test_everything_that_was_measured_is_kept_as_data(all_fit):
    kept = []
    todo = [SMALL, tune.Task("product", "half", 1024)]
    chosen = tune.run(TABLE, 90, todo, pretend, minutes=10**6, keep=lambda entries: kept.append(dict(entries)))
    assert [list(entries) for entries in kept] == [["sums half 64"], ["sums half 64", "product half long"]]
    entry = json.loads(json.dumps(kept[-1]))["sums half 64"]
    assert entry["rows"] == list(SMALL.rows)
    assert entry["measured"][0]["block_m"] == chosen[SMALL].block_m
    assert [m["shipped"] for m in entry["measured"]].count(True) == 1
    assert entry["dropped"]["RuntimeError"] > 0


def test_without_time_the_shipped_one_is_measured(all_fit, capsys):
    measured, _ = tune.tune(SMALL, TABLE, 90, pretend, until=time.monotonic() - 1)
    assert [m.config for m in measured] == [shipped(SMALL, 90)]
    assert "left for want of time" in capsys.readouterr().out
    assert tune.run(TABLE, 90, [SMALL], pretend, minutes=-1) == {}
    assert "give more --minutes" in capsys.readouterr().out


def test_the_table_that_is_written_is_read(all_fit, tmp_path, monkeypatch, capsys):
    todo = [SMALL, tune.Task("product", "half", 1024)]
    chosen = tune.run(TABLE, 90, todo, pretend, minutes=10**6)
    assert set(chosen) == set(todo)
    printed = capsys.readouterr().out
    assert "product half long" in printed
    assert tune.formatted(TABLE) == configs.TABLE.read_text()  # so that a diff shows what has changed, and no more
    path = tmp_path / "new" / "configs.json"
    tune.write(tune.formatted(tune.merged(TABLE, 90, chosen)), path)
    assert json.loads(configs.TABLE.read_text()) == TABLE
    monkeypatch.setenv(configs.ENVIRONMENT, str(path))
    caches = (configs._table, configs._lookup)
    try:
        for cache in caches:
            cache.cache_clear()
        assert configs.lookup("sums", 90, torch.bfloat16, 64) == chosen[SMALL]
        assert configs.lookup("product", 90, torch.float16, 5000) == chosen[todo[1]]
        assert configs.lookup("sums", 90, torch.bfloat16, 128) == shipped(tune.Task("sums", "half", 128), 90)
        assert configs.lookup("sums", 80, torch.bfloat16, 64) == shipped(SMALL, 80)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_tiles_with_masks_that_would_not_divide_the_others_are_not_written():
    chosen = {SMALL: shipped(SMALL, 90)._replace(block_m=64, block_n=64)}
    masked = tune.Task("masked_sums", "half", 64)
    fits = tune.merged(TABLE, 90, chosen | {masked: shipped(masked, 90)._replace(block_m=32, block_n=64)})["sm_90"]
    assert fits["sums"]["half"]["64"]["block_n"] == 64
    assert fits["masked_sums"]["half"]["64"]["block_m"] == 32
    not_so = tune.merged(TABLE, 90, chosen | {masked: shipped(masked, 90)._replace(block_n=128)})
    assert not_so == TABLE


def test_an_override_ends():
    before = configs.lookup("sums", 90, torch.bfloat16, 64)
    other = before._replace(num_stages=7)
    with contextlib.suppress(KeyError), configs.override({"sums": other, "gradient": None}):
        assert configs.lookup("sums", 80, torch.float32, 1) == other
        assert configs.lookup("gradient", 90, torch.bfloat16, 64) is None
        raise KeyError
    assert configs.lookup("sums", 90, torch.bfloat16, 64) == before


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ({}, "needs an NVIDIA GPU"),
        ({"kernels": ["sums", "addition"]}, "--op: expected some of sums"),
        ({"kinds": ["double"]}, "--dtype: expected some of half"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, refused, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(**arguments) == 2
    assert refused in capsys.readouterr().out
