"""Call the public functions on the stub and print as JSON what `test_launch_path.py` checks."""

import json
import os
import sys
import tempfile
from pathlib import Path

import stub_driver
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import selfsup_kernels as sk
from selfsup_kernels.tiles import kernels

torch.set_num_threads(1)
torch.manual_seed(0)
os.environ["SELFSUP_KERNELS_ARCHIVE"] = "0"
stub = stub_driver.install(Path(tempfile.mkdtemp()))
if not stub.in_place():
    print(json.dumps({"skip": "another libcuda.so.1 is loaded"}))
    sys.exit()


def info_nce(batch, dim=64, dtype=torch.bfloat16, upstream=None, **options):
    views = torch.randn(2, batch, dim, dtype=dtype, requires_grad=True)
    loss = sk.info_nce_loss(views, impl="triton", **options)
    loss.sum().backward() if upstream is None else upstream(loss).backward()


def launched(call):
    """Return the launches of ``call`` by kernel name."""
    before = len(stub.launches)
    call()
    return {launch.kernel: launch for launch in stub.launches[before:]}


def variants(kernels, call, *cases):
    """Return how many kernels the later calls compile in addition to those of the first call."""
    call(cases[0])
    before = sum(map(stub_driver.variants, kernels))
    for case in cases[1:]:
        call(case)
    return sum(map(stub_driver.variants, kernels)) - before


def one_of_three(place):
    """Return a function that sums losses, so that the upstream gradient is an element of a tensor."""
    return lambda loss: (torch.stack([loss if i == place else loss.detach() for i in range(3)]) * torch.ones(3)).sum()


found, fresh = {}, {}  # observed values; numbers of additionally compiled kernels

# Numbers: float64 by annotation, negative integers, None.
some = launched(lambda: info_nce(100, temperature=1 / 3, eps=1e-300))
found["load"] = {name: some["load_rows_kernel"].values.get(name) for name in ("temperature", "eps", "order")}
found["core"] = some["sums_kernel"].values["core_view"]
found["map"] = some["sums_kernel"].values["source_x"]
queue = torch.randn(70, 64, dtype=torch.bfloat16)
some = launched(lambda: info_nce(100, core_view=1, queue=queue))
found["other core"] = some["sums_kernel"].values["core_view"]
# A training step does not recompile because a size or the alignment of a pointer changes.
gradient = [kernels.gradient_kernel]
waves = [kernels.wave_kernel, kernels.product_kernel]
load, finish, tables = kernels.load_rows_kernel, kernels.finish_rows_kernel, kernels.view_tables_kernel
places = torch.linspace(0.1, 0.2, 3)
fresh["batch"] = variants([*gradient, load, finish, tables], info_nce, 64, 1000, 257, 2)
fresh["labels"] = variants(gradient, lambda n: info_nce(n, labels=torch.arange(n) % 3), 64, 65, 66, 67)
fresh["waves"] = variants(waves, lambda n: info_nce(n, 512), 100, 300, 1000)
fresh["upstream"] = variants([finish], lambda i: info_nce(64, dtype=torch.float32, upstream=one_of_three(i)), 0, 1, 2)
fresh["temperature"] = variants([load], lambda i: info_nce(64, temperature=places[i]), 0, 1, 2)

# Many rows: kernels with the shipped tiles, up to 200 KB of shared memory.
large = launched(lambda: info_nce(4096, 256))
found["shared"] = max(launch.shared for launch in large.values())
found["refused"], found["launches"] = list(stub.refused), len(stub.launches)


# Calls that the stub must refuse.
@triton.jit
def nothing(x, y, n):
    tl.store(x + n, 1.0)


@triton.jit
def tile(source, out):
    i = tl.arange(0, 64)
    tl.store(out + i[:, None] * 64 + i[None, :], source.load([0, 0]))


def refusals(call, error=RuntimeError):
    del stub.refused[:]
    try:
        call()
    except error as refused:
        return [str(refused), *stub.refused]
    return list(stub.refused)


def misread():
    flat = stub_driver._flat
    stub_driver._flat = lambda *a: ((name, kind, value, name == "n") for name, kind, value, _ in flat(*a))
    nothing[(1,)](x, x, 5)
    stub_driver._flat = flat


def misplaced():
    descriptor = TensorDescriptor(x, [64, 64], [64, 1], [64, 64])
    descriptor.base = x.view(-1)[1:]
    tile[(1,)](descriptor, x)


x = torch.zeros(64, 64)
found["grid"] = refusals(lambda: nothing[(1, 70000)](x, x, 3))
found["misread"] = refusals(misread)
found["misplaced"] = refusals(misplaced)
print(json.dumps({"found": found, "fresh": fresh}))
