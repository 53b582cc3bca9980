"""Test the loss over a group on a GPU, with NCCL and one process (several GPUs were not available).

The exchange is the same as on the CPU, where `tests/test_distributed.py` runs 2, 3 and 4 processes.
"""

import interpreter16
import pytest
import torch
import torch.distributed as dist
from helpers import assert_within, randn, random_labels, run
from ranks import Ranks

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.core import backends

IMPL = "triton"


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_two_emulated_processes():
    """Two processes run the whole loss over a group in Triton's interpreter, which takes CPU tensors."""
    if not backends.emulated("triton"):
        pytest.skip("needs TRITON_INTERPRET=1; NCCL with several GPUs is not tested")
    processes = Ranks(2)
    views = randn(2, 13, 20)
    for labels in (None, random_labels(13, 3)):
        queue = randn(5, 20, seed=1)
        want = run(spec.info_nce_loss, views.double(), 0.2, labels=labels, queue=queue.double())
        results = processes.run(2, of_two, views, labels, queue)
        assert_within("loss", results[1][0], want[0])
        assert_within("grad", torch.cat([grad for _, grad, _ in results], 1) / 2, want[1])
        assert_within("temperature", sum(t for _, _, t in results) / 2, want[2])
    processes.close()


def of_two(group, views, labels, queue):
    """Run the loss in one of two processes: rank 0 has 9 samples, rank 1 has 4."""
    interpreter16.install()
    mine = slice(0, 9) if dist.get_rank(group) == 0 else slice(9, 13)
    labels = None if labels is None else labels[mine]
    return run(sk.info_nce_loss, views[:, mine], 0.2, labels=labels, queue=queue, group=group, impl="triton")


@pytest.mark.cuda
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_group_of_one(group, impl, device, dtype, reduction, labelled):
    views = randn(2, 300, 64, dtype=dtype).to(device)
    labels = random_labels(300, 9).to(device) if labelled else None
    upstream = randn(2, 300, seed=5).to(device) if reduction == "none" else torch.tensor(1.0, device=device)
    temperature = torch.tensor(0.2, dtype=dtype).item()
    known = {"reduction": reduction, "labels": labels}
    want = run(spec.info_nce_loss, views.double(), temperature, upstream.double(), **known)
    eager = run(spec.info_nce_loss, views, temperature, upstream, **known)
    got = run(sk.info_nce_loss, views, temperature, upstream, group=group, impl=impl, **known)
    for name, ours, exact, yardstick in zip(("loss", "grad"), got, want, eager, strict=False):
        assert_within(name, ours, exact, yardstick)
