"""Test machine code that was compiled ahead of time, without a GPU, on the stub driver: its launches equal Triton's,
what is not there is compiled, and a process without Triton can use it.

The calls run in separate processes, since this one may be interpreting.
"""

import pytest
from helpers import on_the_stub

from selfsup_kernels.core import backends

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def found():
    return on_the_stub("ahead.py", TRITON_DISABLE_LINE_INFO="1")


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


def test_the_driver_refuses_nothing(found):
    assert found["refused"] == []


def test_a_process_without_triton(found):
    without = found["without Triton"]
    assert without["launches"] == [5, 5]
    assert without["imported"] == []
    assert "no machine code of load_rows_kernel" in without["error"]
    assert "pip install 'triton>=3.6'" in without["error"]
