"""The GPU benchmark suite, as far as a machine without a GPU can tell: every row and adaptor, well-formed results."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import accuracy  # noqa: E402
import gpu  # noqa: E402
import peers  # noqa: E402
import workloads as w  # noqa: E402

# Workloads of a few hundred numbers; what is compared is exact up to rounding.
pytestmark = pytest.mark.unpoisoned


def suite(tmp_path, *extra):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", *extra]
    return subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), *arguments], capture_output=True, text=True)


def load(tmp_path, name):
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    run = suite(out, "--skip", "compile", "lightly")
    assert run.returncode == 0, run.stderr
    return out, run.stdout


@pytest.mark.parametrize("name", ["info_nce", "byol", "ema"])
def test_results_are_well_formed(results, name):
    out, printed = results
    data = load(out, name)
    assert {"device", "torch", "triton", "driver", "date", "copy_gb_per_s"} <= set(data["header"])
    assert data["rows"]
    for row in data["rows"]:
        assert "failed" not in row, row
        assert "selfsup_kernels" in row["times"]
        assert row["fraction"] > 0
        assert ("tflops" in row) == (name == "info_nce")
        for times in row["times"].values():
            assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
        for errors in row["errors"].values():
            assert all(0 <= error < (0.1 if "bfloat16" in row.values() else 1e-4) for error in errors.values())
    assert "rivals, times ours" in printed


def test_every_rival_has_a_time_or_a_reason(results):
    out, _ = results
    for row in load(out, "info_nce")["rows"]:
        assert set(row["times"]) | set(row["unavailable"]) == {
            *("selfsup_kernels", gpu.CUDA, "eager", "compile", "chunked"),
            *peers.INFO_NCE,
        }
        assert row["unavailable"]["lightly"] == row["unavailable"]["compile"] == "skipped: by --skip"
    mixed = [row for row in load(out, "ema")["rows"] if row["source"] == "bfloat16"]
    assert mixed[0]["unavailable"]["foreach_lerp"] == "refuses mixed dtypes"


def test_out_of_time(tmp_path):
    run = suite(tmp_path, "--minutes", "0")
    assert run.returncode == 0, run.stderr
    for name in ("info_nce", "byol", "ema"):
        assert {row["failed"] for row in load(tmp_path, name)["rows"]} == {"skipped: out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr


class FakeSuite(gpu.Suite):
    """Without the measurement of rates, which takes most of the time."""

    def __init__(self, out):
        self.clock = gpu.timing.Clock("cpu", target_ms=1)
        self.out, self.quick, self.skip, self.deadline = out, True, set(), float("inf")
        self.rows, self.header = {"info_nce": []}, {}


def test_a_rival_that_fails_hides_nothing(tmp_path):
    def of(error):
        def fails(views):
            raise error

        return fails, None

    rivals = {
        "large": of(torch.OutOfMemoryError("tried to allocate")),
        "broken": of(ValueError("no\nsuch thing")),
        "missing": (None, "absent: x"),
        "eager": (w.eager_info_nce, None),
    }
    columns, unavailable = FakeSuite(tmp_path).rivals(rivals, [w.info_nce_inputs(8, 4)], {"one": lambda *_: 1})
    assert unavailable == {"large": "out of memory", "broken": "ValueError: no", "missing": "absent: x"}
    assert list(columns["times"]) == ["eager"]
    assert columns["one"] == {"eager": 1}


def test_operations_and_bytes():
    assert w.info_nce_operations(10, 3, "forward", "cpu") == w.info_nce_operations(10, 3, "forward", "triton") == 300
    assert w.info_nce_operations(10, 3, "both", "cpu") == 1200
    assert w.info_nce_operations(10, 3, "both", "triton") == 1500
    assert w.byol_bytes(4, 8, "both", 2) == w.byol_bytes(4, 8, "forward", 2) + w.byol_bytes(4, 8, "backward", 2)
    assert w.ema_bytes(5, torch.float32) == 60
    assert w.ema_bytes(5, torch.bfloat16) == 50
    for model, numbers in {"ResNet-50": 25_557_032, "ViT-B": 86_567_656}.items():
        assert sum(torch.Size(s).numel() for s in w.EMA_MODELS[model]()) == numbers


def test_chunked_loss_is_the_eager_one():
    (views,) = w.info_nce_inputs(20, 8, torch.float64)
    want = accuracy.with_gradient(w.eager_info_nce, (views,))
    got = accuracy.with_gradient(lambda v: peers.chunked_info_nce(v, chunk=7), (views,))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_errors_of_some_rows(monkeypatch):
    """Those of everything where nothing is wrong, and large where a loss or a gradient is."""
    (views,) = w.info_nce_inputs(40, 8)
    some = accuracy.info_nce_errors_of_rows(views, count=80)
    whole = accuracy.errors(w.our_info_nce, (views,), accuracy.info_nce_truth(views))
    assert some["gradient"] == pytest.approx(whole["gradient"], rel=0.5)
    assert max(some["loss"], some["gradient"]) < 1e-5
    ours = accuracy.sk.info_nce_loss

    def wrong(views, **arguments):
        return ours(views, **arguments) + 1e-2 * views.square().sum(-1)

    monkeypatch.setattr(accuracy.sk, "info_nce_loss", wrong)
    wrong = accuracy.info_nce_errors_of_rows(views)
    assert min(wrong["loss"], wrong["gradient"]) > 1e-3


def linear_cross_entropy(rows, weight, target):
    return F.cross_entropy(rows @ weight.T, target)


class FakeNTXent:
    def __init__(self, temperature):
        self.temperature = temperature

    def __call__(self, first, second):
        assert self.temperature == w.TEMPERATURE
        return w.eager_info_nce(torch.stack([first, second]))


class FakeAverage:
    """Takes what timm's ModelEmaV3 takes."""

    def __init__(self, model, decay):
        self.module, self.decay = torch.nn.ParameterList([p.detach().clone() for p in model.parameters()]), decay

    def update(self, model):
        for mean, new in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.lerp_(new.to(mean.dtype), 1 - self.decay)


FAKES = {
    "inf_cl": {"cal_inf_loss": lambda q, k, labels=None, scale=None, head_dim=256: linear_cross_entropy(q, k, labels)},
    "cut_cross_entropy": {"linear_cross_entropy": lambda e, c, targets: linear_cross_entropy(e, c, targets)},
    "liger_kernel.transformers": {
        "LigerFusedLinearCrossEntropyLoss": lambda: (
            lambda lin_weight, _input, target: linear_cross_entropy(_input, lin_weight, target)
        )
    },
    "lightly.loss": {"NTXentLoss": FakeNTXent},
    "timm.utils": {"ModelEmaV3": FakeAverage},
}


@pytest.fixture
def fake_peers(monkeypatch):
    """Modules of the peers' names whose functions take what theirs take."""
    for name, members in FAKES.items():
        package, _, rest = name.partition(".")
        for module in (package, name) if rest else (package,):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for member, value in members.items():
            setattr(sys.modules[name], member, value)


@pytest.mark.parametrize("name", peers.INFO_NCE)
def test_adaptors_of_the_losses(name, fake_peers):
    """They pass the right rows and targets: with a row's similarity with itself, where the peer keeps it."""
    function, reason = peers.load(peers.INFO_NCE, name)
    assert reason is None
    (views,) = w.info_nce_inputs(12, 16, torch.float64)
    z = F.normalize(views.reshape(24, 16), dim=-1)
    scores = z @ z.T / w.TEMPERATURE
    if name not in peers.NOTES:
        scores = scores.masked_fill(torch.eye(24, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(function(views), F.cross_entropy(scores, torch.arange(24).roll(12)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptor_of_the_average(dtype, fake_peers):
    targets, sources = w.ema_inputs(dtype, [(3, 2), (4,)])
    call, reason = peers.load(peers.EMA, "timm", targets, sources)
    assert reason is None
    with torch.no_grad():
        call()


def test_absent_peers_are_listed_as_absent(monkeypatch):
    for name, (package, _) in peers.INFO_NCE.items():
        monkeypatch.setitem(sys.modules, package, None)
        function, reason = peers.load(peers.INFO_NCE, name)
        assert function is None
        assert reason.startswith("absent")


def test_peers_that_fail_while_imported_are_listed(monkeypatch):
    def fails(name):
        raise AttributeError("no such member")

    monkeypatch.setattr(peers.importlib, "import_module", fails)
    assert peers.load(peers.INFO_NCE, "Liger") == (None, "AttributeError: no such member")
