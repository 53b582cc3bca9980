"""Test machine code that was compiled ahead of time, without a GPU, on the stub driver: its launches equal Triton's,
what is not there is compiled, and a process without Triton can use it.

The calls run in separate processes, since this one may be interpreting.
"""

import pytest
import torch
from helpers import on_the_stub

import selfsup_kernels as sk
from selfsup_kernels import spec
from selfsup_kernels.core import backends
from selfsup_kernels.tiles import archive, launcher

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def found():
    return on_the_stub("ahead.py")


def test_launches_equal_those_of_triton(found):
    assert {name: wrong for name, (_, wrong) in found["same"].items() if wrong} == {}


def test_triton_launches_nothing_that_is_there(found):
    assert {name: count for name, (count, _) in found["same"].items() if count} == {}


def test_triton_compiles_what_is_not_there(found):
    assert {name: wrong for name, (_, wrong) in found["others"].items() if wrong} == {}
    assert all(count > 0 for count, _ in found["others"].values())
    assert found["others"]["alignment"][0] == 1  # all other kernels of that call are there


def test_a_hook_of_triton_sees_every_launch(found):
    assert found["hooked"]


def test_only_an_archive_of_these_kernels_is_used(found):
    assert found["opens"] == {"it": True, "off": False, "other kernels": False, "broken": False, "missing": False}


def test_a_gpu_takes_only_code_that_it_runs(found):
    assert found["architectures"] == {"90": True, "80": False, "103": False}


@pytest.mark.parametrize("failure", ["cut", "unloadable"])
def test_what_cannot_be_loaded_is_left_to_triton(found, failure):
    launched, *said = found[failure]
    assert launched
    assert len(said) == 1
    assert "first calls compile their kernels" in said[0]


def test_the_driver_refuses_nothing(found):
    assert found["refused"] == []


def test_a_process_without_triton(found):
    without = found["without Triton"]
    assert without["launches"] == [5, 5]
    assert without["imported"] == []
    assert without["refusals"][0] is None
    assert "no kernels for this GPU compiled ahead of time" in without["refusals"][1]
    assert "no machine code of load_rows_kernel" in without["error"]
    assert "pip install 'triton>=3.6'" in without["error"]


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [100, 16384])
@pytest.mark.parametrize("dim", [64, 256, 768])
@pytest.mark.parametrize("labelled", [False, True])
def test_results_on_a_gpu(monkeypatch, batch, dim, labelled):
    """A call that takes all its kernels from the archive gives the loss of one that Triton compiles, up to the order of
    atomic additions, and for few rows the dense loss."""
    if archive.opened() is None:
        pytest.skip("needs `make kernels` for this GPU")
    labels = torch.arange(batch, device="cuda") % 7 if labelled else None
    views = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)

    def call():
        backends.load_extension()[0].tape.clear()
        given = views.clone().requires_grad_()
        loss = sk.info_nce_loss(given, labels=labels, impl="triton")
        loss.backward()
        return loss.detach().float(), given.grad.float()

    with monkeypatch.context() as patched:
        patched.setattr(launcher, "kernel_of", None)  # Triton is not asked
        loss, grad = call()
    monkeypatch.setattr(archive, "opened", lambda: None)
    want, want_grad = call()
    assert torch.allclose(loss, want, rtol=1e-5)
    assert (grad - want_grad).norm() <= 1e-3 * want_grad.norm()
    if batch == 100:
        assert torch.allclose(loss.double(), spec.info_nce_loss(views.double(), labels=labels), rtol=1e-2)
