"""Say what bounds each GPU kernel, by the hardware's own counters: every kernel of some calls under Nsight Compute.

    python benchmarks/gpu_counters.py [--out DIR] [--only TEXT ...]      or: make gpu-counters PYTHON=python3

``ncu`` says of each kernel how busy the units are, what its warps wait for and what bounds it; its reports go to
``DIR/counters-*.ncu-rep`` (default: ``benchmarks/results/<device>/``), which ``ncu --import`` prints again, also as
CSV. The clocks stay as they are, and so do the caches. A time under the profiler is no benchmark:
``benchmarks/gpu.py`` is.

``ncu`` runs this file again for each call, with ``--call``, which makes it twice: the second time with the profiler on.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
SECTIONS += ("LaunchStats",)


def calls(quick=False):
    """Return ``{name: (workload, implementation)}``: each kind of kernel, at the sizes of the first tables."""
    from selfsup_kernels.lab.bench.workloads import case

    rows, pairs, model = (32, 48, "tiny") if quick else (16384, 262144, "ResNet-50")
    shapes = [(rows, dim, "bfloat16") for dim in (256, 128, 512)]
    shapes += [(rows, 256, "float32"), (rows // 16, 128, "bfloat16")]
    made = [("triton", case("info_nce", views=2, batch=b, dim=d, dtype=dtype)) for b, d, dtype in shapes]
    made += [("cuda", case("byol", views=1, batch=pairs, dim=256)), ("cuda", case("ema", model=model))]
    return {f"{impl}: {workload.label}": (workload, impl) for impl, workload in made}


def make_call(workload, impl):
    """Make one call twice, the second time with the profiler on."""
    import torch

    gpu = torch.cuda.is_available()
    function, part = workload.ours(impl), workload.parts[-1]
    inputs = workload.inputs("cuda" if gpu else "cpu")
    workload.run(part, function, inputs)  # compiles
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    workload.run(part, function, inputs)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def command(ncu, name, folder):
    """Return the command that makes a call under the profiler."""
    report = folder / f"counters-{re.sub(r'[^a-z0-9]+', '-', name.lower())}"
    return [
        *(ncu, "--force-overwrite", "--export", str(report), "--page", "details"),
        *("--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"),
        *(word for section in SECTIONS for word in ("--section", section)),
        *(sys.executable, str(Path(__file__).resolve()), "--call", name),
    ]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="calls whose name holds one of these")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call:
        make_call(*calls()[options.call])
        return 0
    import torch

    from selfsup_kernels.lab.bench import results

    ncu, reason = shutil.which("ncu"), None
    names = [name for name in calls() if not options.only or any(text in name for text in options.only)]
    if not ncu:
        reason = "ncu is not on PATH: it comes with the CUDA toolkit, as Nsight Compute"
    elif not torch.cuda.is_available():
        reason = f"needs an NVIDIA GPU and a CUDA build of PyTorch; this is {torch.__version__} and sees none"
    elif not names:
        reason = f"--only: expected a part of one of {', '.join(calls())}, got {' '.join(options.only)}"
    if reason:
        print(f"gpu-counters: {reason}")
        return 2
    device = results.folder_name({"device": torch.cuda.get_device_name()})
    folder = (options.out or ROOT / "benchmarks" / "results" / device).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if subprocess.run(command(ncu, name, folder), cwd=ROOT).returncode]
    for name in failed:
        print(f"gpu-counters: {name}: ncu failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
