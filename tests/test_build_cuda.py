"""Test the build of the CUDA library: when it runs, for which GPUs, its messages if it cannot, and its result."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_build import recorded, run, tree  # noqa: F401

from selfsup_kernels.core import backends, build, build_cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_static  # noqa: E402

try:
    NVCC = build_cuda.find_nvcc()
except build_cuda.Unavailable:
    NVCC = None
LIBRARY = ROOT / "selfsup_kernels" / build_cuda.LIBRARY

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-code) printf 'sm_80\\nsm_90\\n{more}' ;;
  *) echo "fake nvcc: $*" >&2
     {action} ;;
esac
"""
# Writes a file that is not a library to the path of -o: these tests check the commands, not the result.
WRITES = 'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo built > "$2"; fi; shift; done'


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Return a function that makes a fake toolkit of a release, whose compiler runs a given shell command."""

    def make(release="13.0", action="exit 1", more="sm_100\nsm_120\n"):
        home = tmp_path / f"cuda-{release}"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(FAKE_NVCC.format(release=release, action=action, more=more.replace("\n", "\\n")))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return str(home)

    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return make


def build_library(tree, **environment):  # noqa: F811
    return run(tree, "setup.py", "build_cuda", **environment)


def one_line(built):
    """Return the last line of a failed build, its error."""
    assert built.returncode != 0
    line = built.stderr.strip().splitlines()[-1]
    assert line.startswith("selfsup_kernels: no CUDA library: ")
    return line


# ---------------------------------------------------------------- setup.py


@pytest.mark.parametrize("release", [None, "12.5"])
def test_no_toolkit_or_one_that_is_too_old(tree, toolkit, tmp_path, release):  # noqa: F811
    home = toolkit(release) if release else str(tmp_path / "nowhere")
    line = one_line(build_library(tree, CUDA_HOME=home))
    assert home in line
    assert ("too old" if release else "there is no") in line
    assert "12.6 or later (12.8 for Blackwell)" in line
    assert "CUDA_HOME" in line


def test_a_compiler_that_fails(tree, toolkit):  # noqa: F811
    toolkit()
    built = build_library(tree)
    assert "nvcc failed" in one_line(built)
    assert "fake nvcc" in built.stderr
    assert not list(tree.rglob("_CUDA*.so"))


def test_architectures_and_jobs_reach_the_compiler(tree, toolkit):  # noqa: F811
    toolkit(action=WRITES)
    built = build_library(tree, TORCH_CUDA_ARCH_LIST="9.0a 8.0+PTX", MAX_JOBS="1")
    assert built.returncode == 0, built.stderr
    assert (tree / "selfsup_kernels" / "_CUDA.so").exists()
    facts = recorded(tree)
    assert (facts["cuda_architectures"], facts["cuda_toolkit"]) == ("9.0a 8.0+PTX", "13.0")
    assert "cuda_failure" not in facts
    commands = (tree / "build" / "cuda" / "build.ninja").read_text()
    for flag in ("90a,code=sm_90a", "80,code=sm_80", "80,code=compute_80", "TORCH_TARGET_VERSION", "-cudart=static"):
        assert flag in commands
    assert "sm_100" not in commands
    assert "fast-math" not in commands


def test_another_build_takes_an_old_library_away(tree, toolkit):  # noqa: F811
    """A failed build removes the old library, which the new record would not describe."""
    toolkit(action=WRITES)
    assert build_library(tree).returncode == 0
    toolkit()
    assert build_library(tree, TORCH_CUDA_ARCH_LIST="8.0").returncode != 0
    assert not list(tree.rglob("selfsup_kernels/_CUDA*.so"))


# ---------------------------------------------------------------- when the library is built


def prepare(cuda, force=False):
    return build_cuda.prepare("2.13.0", cuda, force)


def test_when_the_library_is_built(toolkit):
    toolkit("13.1")
    assert prepare("13.0").version == (13, 1)  # only the major version has to match
    assert prepare(None, force=True).version == prepare("12.8", force=True).version == (13, 1)
    with pytest.raises(build_cuda.Unavailable, match=r"built without CUDA.*FORCE_CUDA=1"):
        prepare(None)
    with pytest.raises(build_cuda.Unavailable, match=r"is of CUDA 13\.1, PyTorch .* of CUDA 12\.8"):
        prepare("12.8")


def setup_step(name, monkeypatch, folder, **environment):
    """Run a step of setup.py, one of its functions, for the package in ``folder``; return its result."""
    import setuptools

    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    space = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), space)
    return space[name](folder)


def setup_cuda(monkeypatch, tmp_path, cuda, **environment):
    """Run setup.py's step for the CUDA library with a torch of the given CUDA version; return its result."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return setup_step("_cuda", monkeypatch, tmp_path / "out", **environment)


def test_the_triton_kernels_are_compiled_for_the_gpus_at_hand_or_listed(monkeypatch, tmp_path):
    """The compiler does not run in the package's folder, whose modules would hide those of the standard library."""
    ran, status = [], [0]
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **o: ran.append((a[0], o)) or SimpleNamespace(returncode=status[0])
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    folder = tmp_path / "selfsup_kernels"

    def step(**environment):
        ran.clear()
        return setup_step("_kernels", monkeypatch, folder, **environment), [a[a.index("--arch") + 1 :] for a, _ in ran]

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step() == ({}, [])
    assert step(TORCH_CUDA_ARCH_LIST="8.6;9.0a;12.0+PTX") == ({}, [["120", "86", "90"]])
    assert ran[0][1]["cwd"] == tmp_path
    assert ran[0][1]["env"]["PYTHONPATH"].startswith(f"{tmp_path}{os.pathsep}")
    assert step(SELFSUP_KERNELS_SKIP_AHEAD="1") == ({}, [])
    monkeypatch.delenv("SELFSUP_KERNELS_SKIP_AHEAD")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 9)][i])
    assert step() == ({}, [["89", "90"]])
    status[0] = 1
    assert "compiling for" in step()[0]["ahead_failure"]


def test_a_failure_is_recorded_and_is_an_error_only_if_the_library_was_requested(toolkit, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    arguments = (monkeypatch, tmp_path)
    monkeypatch.setattr(build_cuda, "ROOT", tmp_path)
    assert "built without CUDA" in setup_cuda(*arguments, None)["cuda_failure"]
    with pytest.raises(SystemExit, match="too old"):
        setup_cuda(*arguments, None, FORCE_CUDA="1", CUDA_HOME=toolkit("12.5"))
    skipped = setup_cuda(*arguments, "12.8", SELFSUP_KERNELS_SKIP_CUDA_BUILD="1")
    assert skipped == {"cuda_failure": "SELFSUP_KERNELS_SKIP_CUDA_BUILD was set."}
    monkeypatch.delenv("SELFSUP_KERNELS_SKIP_CUDA_BUILD")
    monkeypatch.delenv("FORCE_CUDA")
    # The build succeeds without a suitable toolkit, and fails if a suitable one fails.
    assert "too old" in setup_cuda(*arguments, "12.5")["cuda_failure"]
    toolkit("12.8")
    with pytest.raises(SystemExit, match=r"nvcc failed.*\nType: SELFSUP_KERNELS_SKIP_CUDA_BUILD=1 pip install"):
        setup_cuda(*arguments, "12.8")


# ---------------------------------------------------------------- architectures


def test_architectures(toolkit):
    toolkit()
    kit = build_cuda.toolkit()
    assert build_cuda.architectures(kit, "") == ("8.0+PTX", "9.0a", "10.0", "12.0")
    assert build_cuda.architectures(kit, "Hopper; 8.0") == ("9.0+PTX", "8.0")
    toolkit("12.6", more="")
    older = build_cuda.toolkit()
    assert build_cuda.architectures(older, "") == ("8.0+PTX", "9.0a")
    for listed, said in [("7.5", "8.0 .Ampere. or later"), ("12.0", "does not know"), ("sm_90", "expected something")]:
        with pytest.raises(build_cuda.Unavailable, match=said):
            build_cuda.architectures(older, listed)


# ---------------------------------------------------------------- what was built


def test_the_record_matches_the_library():
    facts = build.record()
    if not LIBRARY.exists():
        assert "cuda_architectures" not in facts
        pytest.skip("the CUDA library is not built")
    assert facts["cuda_architectures"]
    assert facts["cuda_toolkit"]


def test_the_library_registers_every_op():
    """The ops are registered in the torch that runs the tests, which may be older than the build's, without a GPU."""
    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    if torch.version.cuda is None:  # this torch cannot load it normally; a separate process does so lazily
        command = [sys.executable, str(ROOT / "benchmarks" / "cuda_static.py"), "--contents"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    assert backends.unavailable("cuda") is None, backends.unavailable("cuda")
    assert cuda_static.without_kernel() == []


def test_an_op_that_is_not_registered_is_found():
    if torch.version.cuda is not None or backends.EMULATOR is not None:
        pytest.skip("the library is loaded into this process")
    assert {"byol_forward", "ema_update_"} <= set(cuda_static.without_kernel())


def test_the_cuda_runtime_is_linked_statically():
    """One library serves several versions of CUDA, and its symbols do not clash with torch's."""
    if not LIBRARY.exists() or shutil.which("nm") is None:
        pytest.skip("the CUDA library is not built, or there is no nm")

    def symbols(*options):
        return subprocess.run(["nm", "-D", *options, LIBRARY], capture_output=True, text=True, check=True).stdout

    assert "cudaLaunchKernel" not in symbols()
    assert not [line for line in symbols("--defined-only").splitlines() if "cuda" in line.lower() and " T " in line]


# ---------------------------------------------------------------- the checks of its machine code

SYMBOL = "_ZN15selfsup_kernels4cuda39_GLOBAL__N__b8c9e04e_7_byol_cu_68e8a845{}IfLi{}ELi8ELb1EEEvNS1_10ParametersIT_EE"
USAGE = """
 Function {symbol}:
  REG:56 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:1968 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
		Function : {symbol}
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/              @!P0 {load} R12, desc[UR6][R2.64] ;    /* 0x0000000602080981 */
        /*0020*/                   {product} R4, R8, R10, R4 ;       /* 0x0000000a0804723c */
        /*0030*/                   {store} [R1], R5 ;                /* 0x0000000501007387 */
"""
PTX = """
.entry {symbol}(
.maxntid 256, 1, 1
.minnctapersm 4
"""


def findings(name="byol_forward_kernel", numbers=4, stack=0, load="LDG.E.128.CONSTANT", product="FFMA", store="STS"):
    symbol = SYMBOL.format(f"{len(name)}{name}", numbers)
    usage = cuda_static.usage_of(USAGE.format(symbol=symbol, stack=stack))[symbol]
    (counts,) = cuda_static.counts_of(
        CODE.format(symbol=symbol, load=load, product=product, store=store).splitlines()
    ).values()
    bounds = cuda_static.bounds_of(PTX.format(symbol=symbol))[symbol]
    found = cuda_static.kernel(symbol, "sm_90a", usage, counts, bounds)
    assert found.name == name
    assert (found.registers, found.bounds, found.instructions) == (56, (256, 4), 4)
    return cuda_static.problems(found), found


def test_the_machine_code_checks_report_each_problem():
    assert findings()[0] == []
    assert findings(stack=16)[0] == ["stack frame of 16 bytes"]
    assert findings(store="STL")[0] == ["1 accesses to local memory"]
    assert findings(load="LDG.E.64")[0] == ["no 128-bit loads"]
    assert findings(load="LDG.E", numbers=1)[0] == []  # the kernel for unaligned rows
    _, fine = findings()
    assert cuda_static.problems(fine._replace(registers=72)) == ["72 registers, with 4 blocks of 256 threads"]


SPILLS = """
__global__ void __launch_bounds__(256) spills_kernel(float* x, int n) {
  float a[100];
  for (int i = 0; i < 100; ++i) a[i] = x[i];
  for (int i = 0; i < n; ++i) a[(i * 7) % 100] += i;
  float s = 0;
  for (int i = 0; i < n; ++i) s += a[(i * 13) % 100];
  x[threadIdx.x] = s;
}
"""


def test_the_machine_code_checks_fail_for_a_real_library(tmp_path):
    """The library has a kernel with an array that does not fit in registers."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    library = tmp_path / "spills.so"
    command = [NVCC, "-shared", "-Xcompiler=-fPIC", "-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    subprocess.run([*command, source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cuda_static.py"), str(library)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILS: sm_80 spills_kernel" in done.stdout
    assert "stack frame" in done.stdout
