"""Test ``make fuzz``: it finds wrong results, each case is repeatable by its number, a failure prints the command that
repeats it, and a crash does not hide other cases."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import IMPLS

ROOT = Path(__file__).resolve().parents[1]
FUZZ = ROOT / "tests" / "fuzz"

PLANTED = """
import json, sys, torch
faults = json.loads(sys.argv[1])
sys.path[:0] = sys.argv[2:]
import cases
from selfsup_kernels.core import ops
from selfsup_kernels.byol import reference as of_byol
from selfsup_kernels.info_nce import few_scores

def with_fault(name, body):
    def planted(asked, impl):
        inner = op(asked, impl)
        def call(*arguments):
            space = {"torch": torch, "arguments": arguments, "result": inner(*arguments)}
            exec(body, space)
            return space["result"]
        return call if asked == name else inner
    return planted

op, functions = ops.overload, cases.FUNCTIONS
few_scores.takes = of_byol.takes = lambda *_: False  # the ops in every case
torch.set_num_threads(1)
seen = {}
for fault, (name, body, function) in faults.items():
    ops.overload = with_fault(name, body)
    cases.FUNCTIONS = {function: functions[function]}
    outcomes = [cases.run(9, number, "reference", "cpu")[2] for number in range(300 if "NaN" in fault else 60)]
    seen[fault] = outcomes.count("WRONG")
print(json.dumps(seen))
"""

FAULTS = {
    "a loss that is off by 1e-3": ("info_nce_forward", "result = (result[0] * 1.001, *result[1:])", "info_nce_loss"),
    "a gradient that is off by 1e-3": ("info_nce_backward", "result = (result[0] * 1.001, result[1])", "info_nce_loss"),
    "one row without its gradient": ("info_nce_backward", "result[0][0, 0] = 0", "info_nce_loss"),
    "the temperature's gradient": ("info_nce_backward", "result = (result[0], result[1] * 1.001)", "info_nce_loss"),
    "a finite gradient of NaN": ("info_nce_backward", "result = tuple(map(torch.nan_to_num, result))", "info_nce_loss"),
    "byol's loss": ("byol_forward", "result = (result[0] + 0.05, *result[1:])", "byol_loss"),
    "byol's gradient": ("byol_backward", "result = result * 1.05", "byol_loss"),
    "an average of another momentum": ("ema_update_", "arguments[0][0].mul_(1.02)", "ema_update_"),
}


def test_planted_faults_are_found():
    """One process for all faults, since starting it takes longer than the cases of one."""
    command = [sys.executable, "-c", PLANTED, json.dumps(FAULTS), str(ROOT), str(FUZZ)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen.keys() == FAULTS.keys()
    assert not [fault for fault, count in seen.items() if count < (1 if "NaN" in fault else 10)], seen


def fuzz(*arguments, folder=FUZZ):
    command = [sys.executable, str(folder), "--impl", IMPLS[-1], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_cases_are_repeatable_by_their_numbers():
    both = [fuzz("--seed", 5, "--verbose", *which).stdout for which in (["--first", 30, "--cases", 6], ["--case", 33])]
    (many, one) = (re.findall(r"^\d+ .* by .*", text, re.M) for text in both)
    assert len(many) == 6
    assert one == [line for line in many if line.startswith("33 ")]


def test_counts_and_status():
    done = fuzz("--seed", 5, "--first", 30, "--cases", 12)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^  all .*\d+ right", done.stdout, re.M)
    assert "12 cases, seed 5" in done.stdout


FAILS = """
inner = run

def run(seed, number, impl, device):
    if number == 2:
        return "byol_loss", "float32", "WRONG", "grad: error 1 > 0"
    if number == 3:
        os.abort()
    return "byol_loss", "float32", "right", ""
"""


def test_a_failure_prints_the_command_that_repeats_it(tmp_path):
    """A wrong result and a crash are each reported in one line, and all other cases run."""
    shutil.copytree(FUZZ, tmp_path / "fuzz")
    with (tmp_path / "fuzz" / "cases.py").open("a") as file:
        file.write("\n\nimport os\n" + FAILS)
    done = fuzz("--seed", 7, "--cases", 8, folder=tmp_path / "fuzz")
    assert done.returncode == 1
    wrong, crash = sorted(line for line in done.stdout.splitlines() if "make fuzz" in line)[::-1]
    assert re.fullmatch(r"WRONG byol_loss by \w+: grad: error 1 > 0: make fuzz SEED=7 CASE=2 IMPL=\w+", wrong)
    assert re.fullmatch(r"CRASH .*: killed by signal 6: make fuzz SEED=7 CASE=3 IMPL=\w+", crash)
    assert "1 CRASH, 1 WRONG, 6 right" in done.stdout


def test_a_process_that_cannot_start_ends_the_run(tmp_path):
    shutil.copytree(FUZZ, tmp_path / "fuzz")
    (tmp_path / "fuzz" / "cases.py").write_text("raise ImportError('not today')\n")
    done = fuzz("--seed", 7, "--cases", 8, folder=tmp_path / "fuzz")
    assert done.returncode == 1
    assert "do not run" in done.stderr
