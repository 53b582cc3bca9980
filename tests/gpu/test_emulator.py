"""Test the emulator of the CUDA kernels: warps and barriers, and that it reports errors."""

import ctypes
from pathlib import Path

import pytest
import torch
from helpers import randn

import selfsup_kernels as sk
from selfsup_kernels.core import backends

SELFTEST = Path(__file__).parents[1] / "emulator" / "selftest.cu"

pytestmark = pytest.mark.skipif(backends.EMULATOR is None, reason="needs SELFSUP_KERNELS_CUDA_EMULATOR")


@pytest.fixture
def library():
    library = ctypes.CDLL(str(backends.EMULATOR))
    library.sk_selftest.restype = ctypes.c_char_p
    library.sk_emulator_seed(ctypes.c_uint64(0))
    yield library
    library.sk_emulator_skip(b"")


def run(library, kernel, a=None, b=None, out=None, n=1):
    """Run a kernel of the self-test and return the emulator's error message, or None."""
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (a, b, out))
    message = library.sk_selftest(kernel.encode(), *pointers, n)
    return None if message is None else message.decode()


def site(text):
    """Return file and line of the barrier that ``text`` marks in the source."""
    lines = SELFTEST.read_text().splitlines()
    return f"selftest.cu:{1 + next(k for k, line in enumerate(lines) if text in line)}".encode()


def test_shuffles_and_barriers(library):
    x, out = randn(5 * 64), torch.empty(5)
    assert run(library, "sum", x, None, out, 5) is None
    torch.testing.assert_close(out, x.view(5, 64).sum(1))


def test_a_missing_barrier_shows(library):
    """Without a barrier, some orders of the threads give another result; eight seeds include one."""
    x = randn(256)
    outputs = []
    for skipped in (b"", site("barrier of sum_kernel")):
        library.sk_emulator_skip(skipped)
        for seed in range(8):
            library.sk_emulator_seed(ctypes.c_uint64(seed))
            out = torch.zeros(256)
            assert run(library, "sum", x, None, out, 4) is None
            outputs.append(out)
    good, broken = outputs[:8], outputs[8:]
    assert all(torch.equal(good[0], out) for out in good)
    assert any(not torch.equal(good[0], out) for out in broken)


def test_a_write_past_shared_memory_is_reported(library):
    assert "past the end" in run(library, "past the end", n=256)


def test_threads_that_disagree_are_reported(library):
    assert "wait for ever" in run(library, "divergent")


def kernels_of_every_op():
    """Yield results of the CUDA kernels that use shared memory, on a few rows."""
    for width, size in ((40, 1), (5000, 1), (5000, 1e-20)):
        p, t = (size * randn(3, 9, width)).requires_grad_(), randn(3, 9, width, seed=1)
        loss = sk.byol_loss(p, t, impl="cuda")
        yield loss.detach()
        yield torch.autograd.grad(loss, p)[0]


def test_every_barrier_of_the_package_is_needed_and_its_loss_is_seen(library):
    """Without any one of the barriers, some order of the threads changes a result."""
    want = list(kernels_of_every_op())
    library.sk_emulator_sites.restype = ctypes.c_char_p
    sites = [s for s in library.sk_emulator_sites().decode().split() if not s.startswith("selftest")]
    assert len(sites) >= 3
    for skipped in sites:
        library.sk_emulator_skip(skipped.encode())
        for seed in range(6):
            library.sk_emulator_seed(ctypes.c_uint64(seed))
            try:
                got = list(kernels_of_every_op())
            except RuntimeError:
                break  # the emulator reports it
            if not all(torch.equal(g, w) for g, w in zip(got, want, strict=True)):  # results are bitwise deterministic
                break
        else:
            pytest.fail(f"nothing changed without the barrier at {skipped}")
