"""EMA of parameters that FSDP2 has sharded over two processes, against the same average of full tensors."""

import pytest
import torch
import torch.distributed as dist
from helpers import randn
from torch import nn

import selfsup_kernels as sk
from selfsup_kernels.compat.timm import ModelEmaV3


def network():
    """A model whose shards have 4 and 3, 2 and 1, and 1 and 0 rows, with running statistics."""
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
    """The copy follows a training model, even if FSDP2 has left parameters gathered."""
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


def views(mesh):
    """A write to a view of a DTensor may go to gathered memory and be lost, so it raises; a source view is fine."""
    from torch.distributed.tensor import Shard, distribute_tensor

    target, source = (distribute_tensor(x, mesh, [Shard(0)]) for x in (torch.zeros(4, 4), torch.ones(4, 4)))
    for view in (lambda x: x[:2], lambda x: x.view(2, 8), torch.t):
        with pytest.raises(TypeError, match=r"targets\[1\]: expected a DTensor of its own, got a view"):
            sk.ema_update_([torch.zeros(2), view(target)], [torch.ones(2), view(source)], 0.5)
    assert torch.equal(target.to_local(), torch.zeros(2, 4))
    for own in (target, target.detach(), torch.nn.Parameter(target)):
        sk.ema_update_([own], [source.view(4, 4)], 0.5)
    assert torch.equal(target.to_local(), torch.full((2, 4), 0.875))


def brings_a_copy(mesh):
    """Both models are created and sharded first."""
    model, own = network(), network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    shard(model, mesh)
    shard(own, mesh)
    ema = sk.EMA(model, 0.5, module=own)
    before, source = whole(own), whole(model)
    ema.update()
    for name, value in whole(ema.module).items():
        torch.testing.assert_close(value, (before[name] + source[name]) / 2)


def is_wrapped_by_fsdp1(rank):
    """Wrapping happens after the EMA is created, in whole or in parts; its names are those of the module inside."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    def wrap(module):
        return FullyShardedDataParallel(
            module, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
        )

    for wrapped in (True, False):
        model = network()
        ema = sk.EMA(model, 0.5)
        before = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model[0] = wrap(model[0])
        outer = wrap(model) if wrapped else model
        assert any("_fsdp_wrapped_module" in name for name, _ in outer.named_parameters())
        object.__setattr__(ema, "_model", outer)
        with torch.no_grad():
            for p in outer.parameters():
                p.add_(2)
        ema.update()
        for name, p in ema.module.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] + 1)


def shares_process_groups():
    """Process groups and meshes are handles: the copy shares the model's, wherever the model stores them."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(), process_group=dist.group.WORLD)
    model.options = {"groups": [dist.new_group([0, 1])]}
    for average in (sk.EMA(model, 0.5), ModelEmaV3(model, 0.5)):
        assert average.module[1].process_group is dist.group.WORLD
        assert average.module.options["groups"][0] is model.options["groups"][0]
        assert average.module.options["groups"] is not model.options["groups"]
        average.update(*[model] if isinstance(average, ModelEmaV3) else [])
        average.module.train()


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
    views(mesh)
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
        brings_a_copy(mesh)
        is_wrapped_by_fsdp1(rank)
        shares_process_groups()
        refuses(mesh, *trains(rank, mesh, "average"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path / "store",), nprocs=2)
