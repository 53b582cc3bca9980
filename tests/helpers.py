"""Code shared by the tests: implementations, random inputs, a brute force in loops, and error bounds."""

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup_kernels import info_nce_loss, spec
from selfsup_kernels.core import backends, build
from selfsup_kernels.core.ops import REDUCTIONS
from selfsup_kernels.info_nce.call import Call
from selfsup_kernels.info_nce.objectives import OBJECTIVES, TABLE, Columns, Ids

EXTENSION_REQUIRED = not build.environment_flag("SELFSUP_KERNELS_SKIP_BUILD")
"""Unless the variable is set, missing C++ kernels end the test session instead of skipping their tests."""
EVERY_CASE = os.environ.get("SELFSUP_KERNELS_EVERY_CASE", "0") not in ("", "0")
"""Runs all cases of the tests, and the longest ones in Triton's interpreter."""
IMPLS = [impl for impl in ("reference", "cpu") if backends.unavailable(impl) is None]
"""The implementations that take CPU tensors; those for GPUs are tested in `tests/gpu`."""
PAIRED_OBJECTIVES = [o for o in OBJECTIVES if TABLE[o].columns != Columns.ALL]
POOLED_OBJECTIVES = [o for o in OBJECTIVES if TABLE[o].columns == Columns.ALL]
"""Those that labels define for one view too."""
LOW_PRECISION = [torch.bfloat16, torch.float16]

FLOAT64_BOUND = 1e-9
FLOAT32_BOUND = 2e-4
TF32_EPS = 2**-9
"""Tensor cores truncate a float32 to 10 bits, an error of up to 2^-10 (rounding would give eps / 2). Both operands are
then too small, and a product by up to this factor."""


def parameters(item) -> list:
    """Return what a case of a test was chosen by, as names and identities of values: one entry of each
    ``parametrize``, which may set several arguments, and of each fixture with parameters."""
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [tuple(names.replace(",", " ").split() if isinstance(names, str) else names) for names in marks]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    groups += [(name,) for name in params if not any(name in names for names in groups)]
    return sorted((names, tuple(id(params[name]) for name in names)) for names in groups if names)


def implementation(item):
    """Return the implementation that a case tests, if a fixture chose it."""
    return next((v for name, v in item.callspec.params.items() if name in ("impl", "op_impl", "each_impl")), None)


def covering(cases, together=2):
    """Choose cases of a test until as many values of its parameters as ``together`` that are in some case are together
    in a chosen one; always the case that adds most of them."""
    met = {case: set(itertools.combinations(parameters(case), together)) for case in cases}
    missing, chosen = set().union(*met.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(met[case] & missing)))
        missing -= met[chosen[-1]]
    return chosen


def benchmarks_script(name):
    """Import the module ``benchmarks/<name>.py``."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randn(*shape, dtype=torch.float32, seed=0):
    """Return normal random numbers, rounded to ``dtype``, the same on every machine and for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_labels(batch, classes, seed=0):
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)) * 7 - 3


def run(function, views, temperature, upstream=None, **arguments):
    """Return (loss, gradient of the views, gradient of the temperature) as detached tensors.

    ``views`` is the (V, B, D) tensor; ``upstream`` weights the loss' elements (ones by default).
    """
    views = views.detach().clone().requires_grad_()
    temperature = torch.as_tensor(temperature, dtype=views.dtype).requires_grad_()
    loss = function(views, temperature=temperature, **arguments)
    weight = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    grad, grad_temperature = torch.autograd.grad(loss, (views, temperature), weight)
    return loss.detach(), grad, grad_temperature


def compare_info_nce(impl, views, temperature=0.1, floor=0.0, cancels=False, tf32=False, **arguments):
    """Check values and gradients (rows, temperature) of ``impl`` against the dense loss in float64.

    The bound for float32 and lower precision is twice the error of the dense loss in the same dtype, or the dtype's
    floor (``bound``) if that is larger. Both get exactly the same inputs. ``cancels``: the temperature's gradient is a
    small sum of large terms (``temperature_rounding``). ``tf32``: float32 products may use TF32, and the bound is that
    of lower precision: ours truncate their operands, which makes every score too small, while PyTorch's may round them
    and be several times more accurate.
    """
    dtype = views.dtype
    queue = arguments.pop("queue", None)
    temperature = torch.tensor(temperature, dtype=dtype)

    def low(function, **extra):
        return run(function, views, temperature, queue=queue, **arguments, **extra)

    ours = low(info_nce_loss, impl=impl)
    wide_queue = None if queue is None else queue.double()
    truth = run(spec.info_nce_loss, views.double(), temperature.double(), queue=wide_queue, **arguments)
    eager = ours if dtype == torch.float64 else low(spec.info_nce_loss)
    eps, floors = torch.finfo(dtype).eps, [floor] * 3
    if tf32 and dtype == torch.float32:
        eps, floors = TF32_EPS, [max(floor, TF32_EPS * want.norm().item()) for want in truth]
    if cancels:
        floors[2] = max(floors[2], temperature_rounding(views, temperature, eps, queue=wide_queue, **arguments))
    names = ("loss", "grad", "temperature")
    for name, got, want, yardstick, least in zip(names, ours, truth, eager, floors, strict=True):
        assert (got.dtype, got.device) == (dtype, want.device)
        assert_within(name, got, want, None if dtype == torch.float64 else yardstick, least)


def temperature_rounding(views, temperature, eps=None, normalize=True, reduction="mean", **arguments):
    """Return the error of the temperature's gradient from rounding alone: unit rows and products in ``dtype``, or with
    ``eps``.

    A scalar with cancelling terms has no norm to be relative to, and eager may be exact by luck. The first part is 3.5
    standard deviations of the error from rounding every element of the unit rows (to first order). The second part is
    one rounding, eps / 2, of each term: their absolute values sum to at most 2 / temperature^2 per anchor.
    """
    assert normalize, "rows of any length are not rounded, and their products have no bound"
    eps, t = eps or torch.finfo(views.dtype).eps, temperature.double().requires_grad_()
    rows = torch.nn.functional.normalize(views.double(), dim=-1).requires_grad_()
    loss = spec.info_nce_loss(rows, temperature=t, normalize=False, reduction=reduction, **arguments)
    (grad_temperature,) = torch.autograd.grad(loss, t, create_graph=True)
    (slope,) = torch.autograd.grad(grad_temperature, rows)
    anchors = views.shape[0] * views.shape[1] if reduction == "sum" else 1
    return eps * ((slope * rows).norm().item() + anchors / t.item() ** 2)


def bound(dtype, want):
    """Return the error allowed to an ideal kernel in ``dtype``: relative to the norm, plus the spacing near zero."""
    norm = want.double().norm().item()
    if dtype == torch.float64:
        return FLOAT64_BOUND * norm
    if dtype == torch.float32:
        return FLOAT32_BOUND * norm
    # Twice one rounding of the result, which is eps / 2 per element. fp16 gradients reach down to its smallest
    # number, below which the spacing is absolute.
    info = torch.finfo(dtype)
    return info.eps * norm + info.tiny * info.eps * math.sqrt(want.numel())


def assert_within(name, got, want, eager=None, floor=0.0):
    """Assert that ``got`` is as close to ``want`` as its dtype allows, or has at most twice the error of ``eager``.

    The tensors may be on different devices: an op returns a temperature's gradient on the GPU, autograd on the
    temperature's device. They are compared on the device of ``want``.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, eager = got.to(want.device), None if eager is None else eager.to(want.device)
    # Values beyond the dtype's range must be infinite, and are not compared.
    beyond = want.isfinite() & ~want.to(got.dtype).isfinite()
    assert got[beyond].isinf().all(), f"{name}: not infinite where {got.dtype} ends"
    got, want = got.masked_fill(beyond, 0), want.masked_fill(beyond, 0)
    eager = None if eager is None else eager.masked_fill(beyond, 0)
    assert got.isfinite().all() or not want.isfinite().all(), f"{name}: not finite"
    error = (got.double() - want.double()).norm().item()
    allowed = max(bound(got.dtype, want), floor)
    if eager is not None:
        eager_error = (eager.double() - want.double()).norm().item()
        allowed = max(allowed, 2 * eager_error if math.isfinite(eager_error) else 0.0)
    assert error <= allowed, (
        f"{name}: error {error:.3e} > {allowed:.3e} (norm {want.double().norm().item():.3e}, {got.dtype})"
    )


def brute_force(
    views,
    *,
    temperature,
    objective,
    labels=None,
    duplicates=None,
    logq=None,
    queue=None,
    core_view=None,
    normalize=True,
    eps=1e-12,
):
    """Return (V, B) losses directly from the table of objectives, in loops over anchors, views and samples.

    Shares no code with the package, not even the choice of view pairs. Differentiable by autograd.
    """
    num_views, batch = len(views), len(views[0])

    def row(h):
        norm = (h * h).sum().sqrt()
        return h / (norm if norm > eps else eps) if normalize else h

    z = [[row(views[v][b]) for b in range(batch)] for v in range(num_views)]
    extra = [] if queue is None else [row(q).detach() for q in queue]

    def lse(scores):
        return torch.logsumexp(torch.stack(scores), 0)

    def mean(values):
        return sum(values) / len(values)

    def meets(u, v):
        return core_view is None or u == v or core_view in (u, v)

    def anchor(u, a):
        def score(v, b):
            expected = 0 if logq is None else (logq[b] if logq.dim() == 1 else logq[v, b])
            return (z[u][a] * z[v][b]).sum() / temperature - expected

        def is_positive(v, b):
            if labels is not None:
                return labels[a] == labels[b] and (v, b) != (u, a)
            return b == a and v != u and meets(u, v)

        def is_negative(v, b):
            if labels is not None:
                return bool(labels[a] != labels[b])
            if duplicates is not None and duplicates[a] == duplicates[b]:
                return False
            return b != a and meets(u, v) and not (v == u and objective == "cross_view")

        everything = [(v, b) for v in range(num_views) for b in range(batch)]
        positive = [score(v, b) for v, b in everything if is_positive(v, b)]
        of_queue = [(z[u][a] * q).sum() / temperature for q in extra]
        negative = [score(v, b) for v, b in everything if is_negative(v, b)] + of_queue
        if not positive:
            return score(u, a) * 0
        if objective == "supcon_out":
            return lse(negative + positive) - mean(positive)
        if objective == "supcon_in":
            return lse(negative + positive) - lse(positive) + math.log(len(positive))
        if objective == "per_positive":
            return mean([lse([*negative, p]) - p for p in positive])
        if objective == "decoupled":
            return lse(negative) - mean(positive) if negative else score(u, a) * 0
        terms = []
        for v in range(num_views):
            positive = [score(v, b) for b in range(batch) if v != u and is_positive(v, b)]
            if not positive:
                continue
            columns = {v} if objective == "cross_view" else {u, v}
            others = labels if labels is not None else duplicates
            apart = [b for b in range(batch) if (b != a if others is None else others[b] != others[a])]
            negative = [score(w, b) for w in columns for b in apart] + of_queue
            terms.append(lse(negative + positive) - mean(positive))
        return mean(terms)

    return torch.stack([torch.stack([anchor(u, a) for a in range(batch)]) for u in range(num_views)])


def check_against_loops(impl, views, temperature, **arguments):
    """Compare per-anchor values and gradients with loops, for ours and for the dense loss."""
    upstream = randn(*views.shape[:2], dtype=torch.float64, seed=9)
    truth = run(brute_force, views, temperature, upstream, **arguments)
    for function in (spec.info_nce_loss, info_nce_loss):
        extra = {"impl": impl} if function is info_nce_loss else {}
        got = run(function, views, temperature, upstream, reduction="none", **arguments, **extra)
        for name, ours, want in zip(("loss", "grad", "temperature"), got, truth, strict=True):
            assert_within(name, ours, want)


def info_nce_call(
    views,
    labels=None,
    queue=None,
    objective="supcon_out",
    core_view=-1,
    normalize=True,
    reduction="none",
    duplicates=None,
    **others,
):
    """Return the ``Call`` for views (V, B, D), or a list of them."""
    facts = {"first": 0, "count": -1, "eps": 1e-12, "temperature": 0.1} | others
    return Call(
        num_views=len(views),
        batch=views[0].shape[0],
        dim=views[0].shape[1],
        queue_rows=0 if queue is None else len(queue),
        ids=int(Ids.DUPLICATES if duplicates is not None else Ids.NONE if labels is None else Ids.LABELS),
        core_view=core_view,
        **TABLE[objective]._asdict(),
        normalize=normalize,
        reduction=REDUCTIONS.index(reduction),
        **facts,
    )


def on_the_stub(script: str) -> dict:
    """Run a script of tests/gpu/stub_driver and return the JSON that it prints.

    It is a process of its own, since this one may be interpreting Triton's kernels. They are compiled as for the
    archive, without line numbers, so that each is compiled once.
    """
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        pytest.skip("needs a C compiler")
    root = Path(__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, root / "tests/gpu/stub_driver" / script],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(root), "TRITON_DISABLE_LINE_INFO": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if "skip" in result:
        pytest.skip(result["skip"])
    return result
