"""The process that runs cases. Its parent does not import torch, since environment variables choose the kernels."""

import os
import sys
from pathlib import Path

LOST = 75
"""The exit status of a process whose GPU takes no more calls, after a case that failed by an illegal access."""
CLASS = 50
"""On a GPU so many cases in a row share what a kernel is compiled for: compiling takes longer than running it."""


def work(seed, numbers, impl, device, current, results):
    import cases
    import torch

    torch.set_num_threads(1)
    if impl == "triton" and os.environ.get("TRITON_INTERPRET"):
        sys.path.append(str(Path(__file__).parents[1] / "gpu"))
        import interpreter16

        interpreter16.install()
    for number in numbers:
        current.value = number
        result = cases.run(seed, number, impl, device)
        results.send((number, *result))
        if device == "cuda" and result[2] == "WRONG":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(LOST)
    results.close()
