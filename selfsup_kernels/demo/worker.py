"""A fresh process for one measurement of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def run(*arguments) -> int | None:
    """Peak bytes of a task, measured by this file's ``main`` in a fresh interpreter: same package, as many threads."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "selfsup_kernels.demo.worker", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(task, *arguments) -> None:
    if task == "loss":
        from selfsup_kernels.demo import sweep

        name, batch = arguments
        peak = sweep.peak_bytes(name, int(batch))
    else:
        from selfsup_kernels.demo import train

        method, name, batch = arguments
        peak = train.peak_bytes(method, name, int(batch))
    print(json.dumps(peak))


if __name__ == "__main__":
    main(*sys.argv[1:])
