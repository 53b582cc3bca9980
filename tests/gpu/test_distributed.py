"""The loss over a group on a GPU: NCCL, one process (several GPUs are not at hand).

The exchange between processes is the same as on the CPU, where `tests/test_distributed.py` has 2, 3 and 4 of them.
"""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_within, randn, random_labels, run

import selfsup_kernels as sk
from selfsup_kernels.reference import dense


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_group_of_one(group, impl, device, dtype, reduction, labelled):
    views = randn(2, 300, 64, dtype=dtype).to(device)
    labels = random_labels(300, 9).to(device) if labelled else None
    upstream = randn(2, 300, seed=5).to(device) if reduction == "none" else torch.tensor(1.0, device=device)
    temperature = torch.tensor(0.2, dtype=dtype).item()
    known = {"reduction": reduction, "labels": labels}
    want = run(dense.info_nce_loss, views.double(), temperature, upstream.double(), **known)
    eager = run(dense.info_nce_loss, views, temperature, upstream, **known)
    got = run(sk.info_nce_loss, views, temperature, upstream, group=group, impl=impl, **known)
    for name, ours, exact, yardstick in zip(("loss", "grad"), got, want, eager, strict=False):
        assert_within(name, ours, exact, yardstick)
