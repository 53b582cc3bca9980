"""Test that the static check of compiled kernels reports spills, too much shared memory and missing instructions.

The kernels are compiled in separate processes, since this one may be interpreting; no GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, triton, triton.language as tl
from selfsup_kernels.tiles import launcher
from selfsup_kernels.lab import machine_code

@triton.jit
def sums_kernel(x, y, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
                DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, ORDER: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(64):
        a = tl.load(x + i * BLOCK_K + m[:, None] * 4096 + k[None, :])
        b = tl.load(y + i * BLOCK_K + n[:, None] * 4096 + k[None, :])
        if DOT:
            total = tl.dot(a, tl.trans(b), total)
        else:
            total += tl.sum(a.to(tl.float32), 1)[:, None] + tl.sum(b.to(tl.float32), 1)[None, :]
        total = tl.exp2(total)
    tl.atomic_add(out + m, tl.sum(total, 1), sem=ORDER)
    tl.store(out + m[:, None] * BLOCK_N + n[None, :], total)

x = torch.zeros(1, dtype=torch.bfloat16)
def problems(m, n, k, dot=True, descriptor=False, order="relaxed", **options):
    options = {"num_warps": 4, "num_stages": 2, **options}
    with machine_code.recording(90) as launches:
        launcher.launch(sums_kernel, (1,), x, x, x.float(), BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, DOT=dot,
                       DESCRIPTOR=descriptor, PRECISION="ieee", ORDER=order, **options)
    return machine_code.problems(launches[0], 90)

print(json.dumps({
    "good": problems(64, 64, 64),
    "spills": problems(128, 256, 64),
    "shared": problems(128, 128, 256, num_warps=8, num_stages=3),
    "products": problems(64, 64, 64, dot=False),
    "copies": problems(64, 64, 64, descriptor=True),
    "compiler": problems(48, 64, 64),
    "registers": problems(128, 128, 64, maxnreg=64),
    "fences": problems(64, 64, 64, order="acq_rel"),
}))
"""


def run(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=kept | environment
    )


COMPLAINTS = {
    "good": [],
    "spills": ["stack frame of", "local loads and stores"],
    "shared": ["KB of 227"],
    "products": ["no HGMMA"],
    "copies": ["no UTMALDG"],
    "compiler": ["arange's range must be a power of 2"],
    "registers": ["Insufficient registers (64)"],
    "fences": ["fences of the whole device"],
}


def test_bad_kernels_are_reported(tmp_path):
    (tmp_path / "kernels.py").write_text(KERNELS)
    done = run(tmp_path / "kernels.py", ROOT)
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    for kernel, complaints in COMPLAINTS.items():
        assert bool(problems[kernel]) == bool(complaints), kernel
        assert all(words in "; ".join(problems[kernel]) for words in complaints), kernel


def test_the_command_names_the_configuration_that_fails(tmp_path):
    table = json.loads((ROOT / "selfsup_kernels/tiles/configs.json").read_text())
    wrong = table["sm_80"]["sums"]["half"]["64"]
    wrong |= {"block_m": 128, "block_n": 128, "num_stages": 12}
    (tmp_path / "configs.json").write_text(json.dumps(table))
    arguments = ["--arch", 80, "--dtype", "bfloat16", "--dim", 64, "--jobs", 1, "--brief"]
    done = run(
        "benchmarks/gpu_static.py",
        *arguments,
        "--json",
        tmp_path / "rows.json",
        SELFSUP_KERNELS_TRITON_CONFIGS=str(tmp_path / "configs.json"),
        TRITON_INTERPRET="1",  # the command removes it
    )
    assert done.returncode == 1, done.stderr
    assert "FAILS: sums sm_80 bfloat16 D=64 (plain): shared memory" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    sums = next(r for r in rows if r["kernel"] == "sums" and r["case"] == "plain")
    assert sums["shared"] > sums["shared_limit"] == 163 * 1024
    assert not [r for r in rows if r["kernel"] == "gradient" and r["problems"]]
