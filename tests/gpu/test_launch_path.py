"""Test Triton's launch path without a GPU: compile launchers, pack arguments, make tensor maps, choose specialisations.
Only the CUDA driver is a stub, which checks its arguments and launches nothing.

The calls run in a separate process, since this one may be interpreting.
"""

import pytest
from helpers import on_the_stub


@pytest.fixture(scope="module")
def calls():
    return on_the_stub("calls.py")


def test_the_driver_refuses_nothing(calls):
    assert calls["found"]["refused"] == []
    assert calls["found"]["launches"] > 100


def test_numbers_arrive_as_they_are(calls):
    found = calls["found"]
    assert found["load"] == {"temperature": 1 / 3, "eps": 1e-300, "order": None}
    assert (found["core"], found["other core"]) == (-1, 1)


def test_tensor_maps_are_of_the_stored_rows(calls):
    _, kind, dims, strides, box, swizzle = calls["found"]["map"]
    assert (kind, dims, strides, swizzle) == (9, [512, 64], [128], 3)  # bfloat16; swizzled, since rows have 128 bytes
    assert box[1] == 64


def test_large_tiles_ask_for_their_shared_memory(calls):
    assert calls["found"]["shared"] > 48 << 10


def test_no_step_waits_for_a_compiler(calls):
    assert calls["fresh"] == dict.fromkeys(calls["fresh"], 0)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("grid", "grid (1, 70000, 1)"),
        ("misread", "n (i32) is 5"),
        ("misplaced", "tensor map, address"),
    ],
)
def test_the_stub_refuses_what_a_driver_would(calls, case, text):
    assert text in "; ".join(calls["found"][case])
