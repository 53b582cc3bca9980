"""EMA of parameters that FSDP2 has spread over two processes, against the same average of the whole tensors."""

import pytest
import torch
import torch.distributed as dist
from helpers import randn
from torch import nn

import selfsup_kernels as sk


def network():
    """Shards of 4 and 3 rows, of 2 and 1, and of 1 and none; running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(3, 3), nn.Linear(3, 1))


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(module):
    """Parameters and buffers as full float64 tensors, gathered from the shards."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    parameters = {k: p.detach().full_tensor().double().clone() for k, p in module.named_parameters()}
    return parameters | {k: b.detach().double().clone() for k, b in module.named_buffers()}


def is_gathered(module):
    from torch.distributed.tensor import DTensor

    return any(not isinstance(p, DTensor) for p in module.parameters())


def trains(rank, mesh, buffers):
    """The copy follows a model that trains, whatever FSDP2 has left gathered in the meantime."""
    model = network()
    ema = sk.EMA(model, 0.8, buffers=buffers)
    shard(model, mesh)
    shard(ema.module, mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    expected = whole(ema.module)
    for step in range(4):
        model.train()
        model(randn(6, 5, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        source = whole(model)
        if step % 2:
            with torch.no_grad():
                model.eval()(randn(2, 5))
                ema.eval()(randn(2, 5))
            assert is_gathered(model)
            assert is_gathered(ema)
        ema.update(None if step else torch.tensor(0.5))
        m = 0.8 if step else 0.5
        for name, value in expected.items():
            parameter = not name.startswith("1.") or name in ("1.weight", "1.bias")
            averaged = parameter or (buffers == "average" and "num" not in name)
            expected[name] = m * value + (1 - m) * source[name] if averaged else source[name]
        got = whole(ema.module)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(got["0.weight"], source["0.weight"])
    saved = {k: v.clone() for k, v in ema.state_dict().items()}
    ema.update(0.0)
    ema.load_state_dict(saved)
    for name, value in whole(ema.module).items():
        assert torch.equal(value, got[name]), name
    return model, ema


def takes_lists(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    target, source = randn(5, 3), randn(5, 3, dtype=torch.bfloat16, seed=1)
    for placement in (Shard(0), Shard(1), Replicate()):
        spread = [distribute_tensor(x.clone(), mesh, [placement]) for x in (target, source)]
        plain = [target.clone(), source]
        sk.ema_update_([spread[0], plain[0]], [spread[1], plain[1]], 0.75)
        want = 0.75 * target.double() + 0.25 * source.double()
        torch.testing.assert_close(spread[0].full_tensor().double(), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(plain[0].double(), want, rtol=1e-6, atol=1e-7)


def refuses(mesh, model, ema):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rows = distribute_tensor(randn(4, 4), mesh, [Shard(0)])
    for source, error, message in (
        (distribute_tensor(randn(4, 4), mesh, [Shard(1)]), ValueError, r"placements.*Shard\(dim=1\)"),
        (distribute_tensor(randn(4, 4), mesh, [Replicate()]), ValueError, "placements"),
        (distribute_tensor(randn(8, 4), mesh, [Shard(0)]), ValueError, r"shape.*\(4, 4\).*\(8, 4\)"),
        (randn(4, 4), TypeError, r"sources\[0\].*DTensor like targets\[0\].*reshard"),
        (
            distribute_tensor(randn(4, 4), init_device_mesh("cpu", (2, 1)), [Shard(0), Replicate()]),
            ValueError,
            "mesh",
        ),
    ):
        before = rows.to_local().clone()
        with pytest.raises(error, match=message):
            sk.ema_update_([rows], [source], 0.5)
        assert torch.equal(rows.to_local(), before)
    with pytest.raises(TypeError, match=r"plain tensor like targets\[0\].*DTensor"):
        sk.ema_update_([randn(4, 4)], [rows], 0.5)
    with pytest.raises(RuntimeError, match=r"model.*before fully_shard.*ema\.module"):
        sk.EMA(model)
    alone = sk.EMA(network())
    object.__setattr__(alone, "_model", model)
    with pytest.raises(TypeError, match=r"0\.weight \(source\).*plain tensor"):
        alone.update()  # the model was sharded, the copy was not
    optimizer = sk.optim.SGD(model.parameters(), 0.1, ema=ema)
    model.train()(randn(6, 5)).square().mean().backward()
    before, before_of_ema = whole(model), whole(ema.module)
    with pytest.raises(TypeError, match=r"params.*DTensor.*ema\.update"):
        optimizer.step()
    for module, values in ((model, before), (ema.module, before_of_ema)):
        for name, value in whole(module).items():
            assert torch.equal(value, values[name]), name


def _process(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        trains(rank, mesh, "copy")
        takes_lists(mesh)
        refuses(mesh, *trains(rank, mesh, "average"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / "store",), nprocs=2)
