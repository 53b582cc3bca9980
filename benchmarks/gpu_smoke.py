"""Calls every op of the GPU kernels once, forward and backward, on small shapes: what compute-sanitizer is run on.

    python benchmarks/gpu_smoke.py [--brief] [--initcheck] [--impl triton cuda]

The shapes are the smallest that reach every kernel and every edge of it: batches that fill no tile, rows that are no
power of two, rows short enough to stay in a program and long ones that come in pieces. The results only have to be
finite here; the tests say whether they are right. ``--brief`` leaves out what differs in its arithmetic alone.

``--initcheck`` leaves out the two places where kernels read unwritten memory on purpose. The sum of the BYOL losses
finds a count of arrivals there (``csrc/cuda/byol.cu``), so the losses are asked for one by one. The last rows of a
wave of InfoNCE, where they do not fill a tile of the product, are multiplied with what was there, and not stored, so
long rows come in numbers that fill it.
"""

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout

import torch

import selfsup_kernels as sk


def info_nce(dtype, batch, dim, device, deterministic=False, labels=False, queue=False, learned=False, **arguments):
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return torch.randn(n, dim, generator=generator).to(device, dtype)

    views = [rows(batch).requires_grad_() for _ in range(2)]
    temperature = torch.tensor(0.2, device=device, requires_grad=True) if learned else 0.2
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    loss = sk.info_nce_loss(
        views,
        temperature=temperature,
        labels=torch.randint(5, (batch,), generator=generator).to(device) if labels else None,
        queue=rows(70) if queue else None,
        impl="triton",
        **arguments,
    )
    loss.float().sum().backward()
    torch.use_deterministic_algorithms(False)
    return [loss, *(v.grad for v in views), *([temperature.grad] if learned else [])]


def byol(dtype, views, dim, reduction, device):
    p, t = (torch.randn(views, 37, dim).to(device, dtype) for _ in range(2))
    loss = sk.byol_loss(p.requires_grad_(), t, reduction=reduction, impl="cuda")
    loss.sum().backward()
    return [loss, p.grad]


def ema(rounding, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    targets = [torch.randn(s).to(device, d) for s in ((3,), (4097,), (64, 65), (1,)) for d in dtypes]
    sources = [torch.randn_like(t, dtype=torch.float32) for t in targets]
    sk.ema_update_(targets, sources, 0.9, stochastic_rounding=rounding, impl="cuda")
    return targets


KINDS = {
    "plain": {},
    "labels, queue": {"labels": True, "queue": True, "reduction": "none", "objective": "per_positive"},
    "deterministic, learned": {"deterministic": True, "queue": True, "learned": True},
}


def calls(brief, initcheck=False):
    """(implementation, name, function of the device) of every call."""
    reduction = "none" if initcheck else "mean"
    sizes = ((131, 40), (300, 128), (256 if initcheck else 131, 300))
    for dtype in (torch.bfloat16,) if brief else (torch.bfloat16, torch.float16, torch.float32):
        for (batch, dim), (name, arguments) in product(sizes, KINDS.items()):
            call = partial(info_nce, dtype, batch, dim, **arguments)
            yield "triton", f"info_nce {dtype} {batch}x{dim} {name}", call
        for views, dim in ((2, 100), (3, 2048)):
            yield "cuda", f"byol {dtype} {views} views, D={dim}", partial(byol, dtype, views, dim, reduction)
    for rounding in (False, True):
        yield "cuda", f"ema rounding={rounding}", partial(ema, rounding)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--initcheck", action="store_true")
    parser.add_argument("--impl", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    failed = 0
    for impl, name, call in calls(options.brief, options.initcheck):
        if impl not in options.impl:
            continue
        try:
            if not all(bool(x.isfinite().all()) for x in call(device=torch.device(options.device))):
                raise ArithmeticError("a result is not finite")
        except Exception as error:  # the other calls run all the same
            failed += 1
            print(f"FAILED {impl} {name}: {type(error).__name__}: {error}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    what = f"by {' and '.join(options.impl)}"
    print(f"{failed} of the calls failed" if failed else f"every op ran {what}, and its results are finite")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
