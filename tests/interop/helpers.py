"""Shared code of the interop tests: asymmetric data, comparison of values and gradients, gloo processes.

Import it as ``from interop.helpers import ...``; plain ``helpers`` is the module of the folder above.
"""

import tempfile
from pathlib import Path

import torch

BOUND = 2e-5
"""Of a float32 drop-in against its original, in the value and, relative to its norm, in each gradient."""


def rows(*shape, dtype=torch.float32, seed=0, spread=True):
    """Return random rows with a common part (similarities are not all near zero) and norms from 0.2 to 5."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spread:
        x = x + 0.5 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
        scale = torch.rand((*shape[:-1], 1), generator=generator, dtype=torch.float64)
        x = x * 0.2 * 25**scale
    return x.to(dtype)


def views(batch, dim, count=2, dtype=torch.float32, seed=0):
    """Return ``count`` views of the same samples; positives are nearer than negatives, and no two pairs are equal."""
    base = rows(batch, dim, dtype=torch.float64, seed=seed)
    noise = [rows(batch, dim, dtype=torch.float64, seed=seed + 1000 + i, spread=False) for i in range(count)]
    return [(base * (1 + 0.3 * i) + (0.3 + 0.2 * i) * n).to(dtype) for i, n in enumerate(noise)]


def label_cases(batch, seed=0):
    """Return labels by name: classes of one, several or all samples, and of mixed sizes."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(4, (batch,), generator=generator) * 7 - 3
    mixed = torch.cat([torch.zeros(batch // 2, dtype=torch.long), torch.arange(1, batch - batch // 2 + 1) // 3 + 5])
    return {
        "one": torch.randperm(batch, generator=generator),
        "many": few,
        "all": torch.full((batch,), 3),
        "mixed": mixed[torch.randperm(batch, generator=generator)],
        "pairs": (torch.arange(batch) // 2)[torch.randperm(batch, generator=generator)],
    }


def value_and_grads(function, inputs, parameters=(), upstream=None):
    """Return ``function(*inputs)`` and its gradients for copies of ``inputs`` and for ``parameters``.

    The gradient is None for inputs that take none. ``upstream`` weights the elements of a loss that is not a scalar.
    """
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    value = function(*leaves)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad] + list(parameters)
    grads = torch.autograd.grad(value, wanted, upstream, allow_unused=True)
    return value.detach(), list(grads)


def assert_near(name, got, want, bound=BOUND, floor=1e-7):
    """Assert that ``got`` is within ``bound`` of ``want``, relative to its norm."""
    assert (got is None) == (want is None), f"{name}: got {got}, expected {want}"
    if want is None:
        return
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error, norm = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= bound * norm + floor, f"{name}: error {error:.3e} at norm {norm:.3e}"  # also fails for NaN


def assert_same(ours, original, inputs, parameters=((), ()), bound=BOUND, upstream=None):
    """Assert that value and gradients of ``ours`` equal those of ``original``, for float32 inputs and in float64.

    ``parameters``: (ours, the original's) whose gradients are compared as well, in float32 only.
    """
    got = value_and_grads(ours, inputs, parameters[0], upstream)
    want = value_and_grads(original, inputs, parameters[1], upstream)
    assert_near("value", got[0], want[0], bound)
    assert len(got[1]) == len(want[1])
    for i, (g, w) in enumerate(zip(got[1], want[1], strict=True)):
        assert_near(f"gradient {i}", _filled(g, w), _filled(w, g), bound)
    return got, want


def _filled(grad, other):
    """Return zeros for a gradient of None if the other side has computed one."""
    return torch.zeros_like(other) if grad is None and other is not None else grad


def _process(rank, world, function, address, folder, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    try:
        torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def run_processes(world, function, *arguments):
    """Run ``function(rank, world, *arguments)`` in each of ``world`` gloo processes; return the results by rank.

    ``function`` is defined in a module, since it is pickled. An exception in a process is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "store"
        torch.multiprocessing.spawn(_process, (world, function, address, folder, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
