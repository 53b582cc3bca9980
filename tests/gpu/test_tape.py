"""Test tapes without a GPU: launches that C++ replays equal those that the Python launchers make, on the stub driver.

The calls run in a separate process, since this one may be interpreting.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup_kernels.core import backends

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def found():
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        pytest.skip("needs a C compiler")
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/gpu/stub_driver/tapes.py"],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if "skip" in result:
        pytest.skip(result["skip"])
    return result


def test_a_replay_makes_the_launches_of_the_first_call(found):
    assert {name: wrong for name, (_, wrong) in found["same"].items() if wrong} == {}


def test_the_second_call_is_replayed_throughout(found):
    assert {name for name, (count, _) in found["same"].items() if count < 6} == set()


def test_faults_in_a_tape_are_noticed(found):
    assert {fault for fault, wrong in found["planted"].items() if not wrong} == set()


def test_a_call_that_a_tape_cannot_repeat_goes_through_python(found):
    assert found["uncovered"] == dict.fromkeys(found["uncovered"], [])


def test_a_changed_argument_or_setting_is_noticed(found):
    assert {name: wrong for name, wrong in found["lies"].items() if wrong} == {}


def test_threads_replay_at_once(found):
    assert found["threads"] == {"errors": [], "python": 0}


def test_a_stream_of_signatures_takes_bounded_memory(found):
    assert 0 < found["known"] <= 1024


def test_a_forked_process_is_refused_with_the_reason(found):
    assert "spawn" in found["forked"]


def test_the_driver_refuses_nothing(found):
    assert found["refused"] == []
