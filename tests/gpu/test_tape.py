"""Test tapes without a GPU: launches that C++ replays equal those that the Python launchers make, on the stub driver.

The calls run in a separate process, since this one may be interpreting.
"""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from helpers import info_nce_call, on_the_stub

import selfsup_kernels as sk
from selfsup_kernels.core import backends, ops

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def found():
    return on_the_stub("tapes.py")


def test_a_replay_makes_the_launches_of_the_first_call(found):
    assert {name: wrong for name, (_, wrong) in found["same"].items() if wrong} == {}


def test_the_second_call_is_replayed_throughout(found):
    assert {name: count for name, (count, _) in found["same"].items() if count} == {}


def test_faults_in_a_tape_are_noticed(found):
    assert {fault for fault, wrong in found["planted"].items() if not wrong} == set()


def test_a_call_that_a_tape_cannot_repeat_goes_through_python(found):
    assert [name for name, kernels in found["uncovered"].items() if kernels] == []


def test_a_changed_argument_or_setting_is_noticed(found):
    assert {name: wrong for name, wrong in found["lies"].items() if wrong} == {}


def test_threads_replay_at_once(found):
    assert found["threads"] == {"errors": [], "python": 0}


def test_a_stream_of_signatures_takes_bounded_memory(found):
    assert 0 < found["known"] <= 1024


def test_a_forked_process_is_refused_with_the_reason(found):
    assert "spawn" in found["forked"]


def test_without_memory_pytorch_raises_its_own_error(found):
    assert "allocate memory" in found["without memory"]


def test_the_driver_refuses_nothing(found):
    assert found["refused"] == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError, KeyboardInterrupt])
def test_an_error_of_a_launcher_keeps_its_type(monkeypatch, error):
    if not backends.triton_is_interpreted():
        pytest.skip("needs the interpreter, which takes CPU tensors")
    from selfsup_kernels.tiles import info_nce

    made = []

    def fail(*arguments):
        tensor = torch.empty(10)
        made.append(weakref.ref(tensor))
        raise error("no more")

    monkeypatch.setattr(info_nce, "forward", fail)
    with pytest.raises(error, match="no more"):
        sk.info_nce_loss(torch.randn(2, 4, 8), impl="triton")
    gc.collect()
    assert made[0]() is None, "the exception is kept, and with it the tensors of the call"
    views = list(torch.randn(2, 4, 8))
    with pytest.raises(RuntimeError, match="no more"):  # without the Function, as in a compiled graph
        ops.overload("info_nce_forward", "triton")(views, None, None, None, None, *info_nce_call(views))


REPLAYED = {
    "views": {},
    "float32": {"dtype": torch.float32},
    "three views, one sample more": {"shape": (3, 257, 96), "objective": "pairwise"},
    "queue": {"queue": 300},
    "labels": {"labels": 17},
    "temperature": {"temperature": torch.tensor(0.2, requires_grad=True)},
    "loss of each anchor": {"reduction": "none"},
    "rows as given": {"normalize": False},
    "long rows": {"shape": (2, 300, 600)},
    "many rows": {"shape": (2, 8192, 128)},
}


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(2, 500, 128), (2, 8192, 128), (2, 300, 600)])
def test_replays_work_in_a_captured_graph(shape):
    from selfsup_kernels import _C

    given = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    views = given.clone().requires_grad_()

    def step():
        loss = sk.info_nce_loss(views, impl="triton")
        return loss, *torch.autograd.grad(loss, views)

    _C.tape.clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    assert _C.tape.size() == 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            views.copy_(torch.randn(shape, device="cuda"))
        others = [torch.randn(shape, device="cuda") for _ in range(4)]  # memory that the graph must not use
        graph.replay()
        # Sums by atomics: the last bits depend on the order.
        torch.testing.assert_close(captured, step(), rtol=1e-2, atol=1e-6)
        del others
    assert _C.tape.size() == 2


@pytest.mark.cuda
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REPLAYED)
def test_a_replay_gives_the_bits_of_python(monkeypatch, case, stream):
    from selfsup_kernels import _C
    from selfsup_kernels.tiles import launcher

    options = dict(REPLAYED[case])
    shape, dtype = options.pop("shape", (2, 500, 128)), options.pop("dtype", torch.bfloat16)
    draw = functools.partial(torch.randn, device="cuda", dtype=dtype)
    if "queue" in options:
        options["queue"] = draw(options["queue"], shape[-1])
    if "labels" in options:
        options["labels"] = torch.randint(options["labels"], shape[1:2], device="cuda")
    if "temperature" in options:
        options["temperature"] = options["temperature"].detach().cuda().requires_grad_()

    def step(views):
        views = [v.clone().requires_grad_() for v in views]
        loss = sk.info_nce_loss(views, impl="triton", **options)
        inputs = [*views, options["temperature"]] if "temperature" in options else views
        return loss, *torch.autograd.grad(loss.sum(), inputs)

    torch.use_deterministic_algorithms(True)
    try:
        _C.tape.clear()
        with torch.cuda.stream(torch.cuda.Stream()) if stream else contextlib.nullcontext():
            step(draw(shape))  # records
            assert _C.tape.size() == 2
            for _ in range(3):
                views = draw(shape)
                replayed = step(views)
                with monkeypatch.context() as patched:
                    launch = launcher.launch
                    patched.setattr(launcher, "launch", lambda *a, **o: launch(*a, **o))  # noqa: B023  no tape then
                    expected = step(views)
                torch.testing.assert_close(replayed, expected, rtol=0, atol=0)
            assert _C.tape.size() == 2
        torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
