"""Test the guard pages: a kernel that reads one element too many crashes."""

import subprocess
import sys
from pathlib import Path

import torch
from guard import guarded

READ_PAST = """
import sys
sys.path.insert(0, {folder!r})
import torch, triton, triton.language as tl
from guard import guarded

@triton.jit
def copy(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, tl.load(x + at))

x = guarded(torch.ones({size}))
copy[(1,)](x, torch.empty(64), 64)
print("read", {size})
"""


def run(size, tmp_path):
    script = tmp_path / "read_past.py"
    script.write_text(READ_PAST.format(folder=str(Path(__file__).parent), size=size))
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin"}
    )


def test_a_read_past_the_end_is_fatal(tmp_path):
    assert "read 64" in run(64, tmp_path).stdout
    assert run(63, tmp_path).returncode < 0


def test_a_guarded_tensor_holds_the_same_numbers():
    x = torch.randn(7, 5)
    assert torch.equal(guarded(x), x)
    assert guarded(x.T).is_contiguous()
