"""The GPU benchmark suite, as far as a machine without a GPU can tell: every row and adaptor, well-formed results."""

import json
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import benchmarks_script

from selfsup_kernels import OBJECTIVES, spec
from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.bench import accuracy, baselines, eager, results, suite
from selfsup_kernels.lab.bench.workloads import MODELS, TEMPERATURE, case

jsonschema = pytest.importorskip("jsonschema")
gpu = benchmarks_script("gpu")

# Workloads of a few hundred numbers; what is compared is exact up to rounding.
pytestmark = pytest.mark.unpoisoned


def run(folder, *arguments):
    """Run the suite on a CPU, without fresh processes, and read its results by operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "call", lambda target, *arguments, **_: suite.probe(*arguments))
        assert gpu.main(["--out", str(folder), "--device", "cpu", "--quick", *arguments]) == 0
    return {op: json.loads((folder / f"{op}.json").read_text()) for op in baselines.BASELINES}


def test_results_are_well_formed(tmp_path, capsys):
    found = run(tmp_path, "--skip", "compile", "lightly")
    assert "EMA update, model tiny" in capsys.readouterr().out
    for data in found.values():
        jsonschema.validate(data, json.loads(results.SCHEMA.read_text()))
        for row in data["rows"]:
            assert row.get("tflops", row.get("gb_per_s")) > 0
            assert 0 < row.get("fraction", 1) <= suite.LARGEST_SHARE
            for errors in row["errors"].values():
                assert all(0 <= error < (0.1 if "bfloat16" in row.values() else 1e-4) for error in errors.values())
    for row in found["info_nce"]["rows"]:
        left_out = {"pytorch-metric-learning NTXentLoss"}
        assert (
            set(row["times"]) | set(row["unavailable"]) == {baselines.OURS, *baselines.BASELINES["info_nce"]} - left_out
        )
        assert row["unavailable"]["lightly"] == row["unavailable"]["compile"] == "skipped: by --skip"
    mixed = [row for row in found["ema"]["rows"] if row["source"] == "bfloat16"]
    assert mixed[0]["unavailable"]["foreach_lerp"] == "refuses mixed dtypes"


def test_out_of_time(tmp_path, capsys):
    for data in run(tmp_path, "--minutes", "0").values():
        for row in data["rows"]:
            assert row["times"] == {}
            assert set(row["unavailable"].values()) == {"skipped: out of time"}
    assert "skipped: out of time" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


# ---------------------------------------------------------------- workloads and errors


def test_operations_and_bytes():
    loss = case("info_nce", views=2, batch=5, dim=3)
    assert loss.operations("forward", "cpu") == loss.operations("forward", "gpu") == 300
    assert loss.operations("both", "cpu") == 1200
    assert loss.operations("both", "gpu") == 1500
    assert loss.bytes("both") == loss.bytes("forward") + loss.bytes("backward") == 360
    crossed = case("info_nce", views=3, batch=5, dim=3, objective="cross_view")
    assert crossed.operations("forward") == 2 * 3 * 5**2 * 3  # three pairs of views, a product of B x B scores each
    byol = case("byol", views=1, batch=4, dim=8, dtype="bfloat16")
    assert byol.bytes("both") == byol.bytes("forward") + byol.bytes("backward") == 5 * 4 * 8 * 2
    for model, numbers in {"ResNet-50": 25_557_032, "ViT-B": 86_567_656}.items():
        made = case("ema", model=model, dtype="bfloat16")
        assert made.numbers == sum(torch.Size(s).numel() for s in MODELS[model]()) == numbers
        assert made.bytes("update") == 10 * numbers


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eager_and_chunked_losses_are_the_specification(objective, views):
    made = case("info_nce", objective=objective, views=views, batch=20, dim=8, dtype="float64")
    options = {"temperature": TEMPERATURE, "objective": objective}
    want = accuracy.with_gradient(lambda v: spec.info_nce_loss(v, **options), made.inputs())
    functions = [baselines.load(made, "eager", made.inputs())[0]]
    functions += [lambda v: eager.chunked_loss(v, TEMPERATURE, chunk=7)] if objective == "supcon_out" else []
    for function in functions:
        for ours, theirs in zip(accuracy.with_gradient(function, made.inputs()), want, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_errors_are_small_where_nothing_is_wrong_and_large_where_something_is():
    made = case("info_nce", views=2, batch=40, dim=8)
    judge = accuracy.judge(made, made.inputs())
    nt_xent, _ = baselines.load(made, "eager", made.inputs())
    for name, function in ((baselines.OURS, made.ours()), ("eager", nt_xent)):
        assert max(judge(name, function).values()) < 1e-5
    wrong = judge("mine:loss", lambda v: nt_xent(v) + 0.1 * v.square().mean())
    assert min(wrong["loss"], wrong["gradient"]) > 1e-3


# ---------------------------------------------------------------- adaptors


def linear_cross_entropy(rows, weight, target):
    return F.cross_entropy(rows @ weight.T, target)


@pytest.fixture
def fake_peers(monkeypatch):
    """Modules of the peers' names whose functions take what theirs take."""

    def inf_cl(q, k, labels=None, scale=None, head_dim=256):
        return linear_cross_entropy(q, k, labels)

    def liger():
        return lambda lin_weight, _input, target: linear_cross_entropy(_input, lin_weight, target)

    for name, members in {
        "inf_cl": {"cal_inf_loss": inf_cl},
        "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
        "liger_kernel": {},
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": liger},
    }.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))


@pytest.mark.parametrize("name", [n for n, r in baselines.BASELINES["info_nce"].items() if r.other])
def test_adaptors_of_the_losses(name, fake_peers):
    """They pass the right rows and targets, with a row's similarity with itself."""
    made = case("info_nce", batch=12, dim=16, dtype="float64")
    inputs = made.inputs()
    function, reason = baselines.load(made, name, inputs)
    assert reason is None
    z = F.normalize(inputs[0].reshape(24, 16), dim=-1)
    want = F.cross_entropy(z @ z.T / TEMPERATURE, torch.arange(24).roll(12))
    torch.testing.assert_close(function(*inputs), want)
    three = case("info_nce", views=3, batch=12, dim=16)
    assert baselines.load(three, name, three.inputs())[1] == "takes two views, not 3"


@pytest.mark.parametrize("name", ["foreach_lerp", "loop", "swa_utils"])
def test_updates_are_the_average(name):
    """Also of copies that a peer holds: they begin where the targets are, so that doing nothing shows."""
    made = case("ema", model="tiny")
    inputs = made.inputs()
    function, _ = baselines.load(made, name, inputs)
    assert accuracy.average_error(function, *inputs) < 1e-6
    still = baselines.Average(lambda: None, [t.clone() for t in inputs[0]])
    assert accuracy.average_error(still, *inputs) > 1e-3


class Broken(types.ModuleType):
    def __getattr__(self, name):
        raise ValueError(f"{name} cannot be had\nand more")


@pytest.mark.parametrize(
    ("module", "reason"),
    [(None, r"absent: .* \(pip install inf-cl\)"), (Broken("inf_cl"), "ValueError: .* cannot be had.*")],
)
def test_peers_that_cannot_be_imported_are_listed(module, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "inf_cl", module)
    made = case("info_nce", batch=8, dim=4)
    function, given = baselines.load(made, "Inf-CL", made.inputs())
    assert function is None
    assert re.fullmatch(reason, given)  # one line
