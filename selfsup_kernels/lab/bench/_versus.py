"""One side of a comparison of two versions of the package: runs the workloads of *this* file's folder on the package of
a given source tree, when it is told to.

    python _versus.py TREE WORKLOADS DEVICE

Requests come as JSON lines on the standard input, answers go as JSON lines to the standard output. Nothing here, nor in
``workloads.py``, needs more of the package than its public functions: the other tree may be older than this file.
"""

import contextlib
import importlib.util
import json
import sys
import time
from pathlib import Path

CALLS_MS = 25.0
"""A turn makes as many calls as fill this time, so that the clock and the first call after a pause weigh little."""


class Side:
    """The cases of one process: made once, called in every turn."""

    def __init__(self, workloads, torch, device):
        self.workloads, self.torch, self.device = workloads, torch, torch.device(device)
        self.calls = {}

    def prepare(self, case, part):
        """Make the inputs, warm up, and say how many calls fill a turn."""
        made = self.workloads.case(**case)
        ours, inputs = made.ours("auto"), made.inputs(self.device, 0)
        self.calls = {"call": lambda: made.run(part, ours, inputs)}
        for _ in range(3):
            once = self.turn(1)["ms"]
        return {"calls": max(1, min(1000, int(CALLS_MS / max(once, 1e-3))))}

    def turn(self, calls):
        """Milliseconds of one call, the mean of ``calls`` in a row; one more goes before them."""
        call = self.calls["call"]
        call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.synchronize()
        return {"ms": 1e3 * (time.perf_counter() - start) / calls}

    def synchronize(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)


def main(tree, workloads, device):
    sys.path[0] = tree  # in the place of this file's folder: the package of that tree, before any that is installed
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        import selfsup_kernels as sk

        if not Path(sk.__file__).resolve().is_relative_to(Path(tree).resolve()):
            raise SystemExit(f"imported {sk.__file__}, which is not in {tree}")
        spec = importlib.util.spec_from_file_location("versus_workloads", workloads)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        side = Side(module, torch, device)

        def answer(value):
            print(json.dumps(value), file=answers, flush=True)

        answer({"impl": sk.backends.select("auto", torch.empty(0, device=device)), "torch": torch.__version__})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "calls" in request:
                    answer(side.turn(request["calls"]))
                else:
                    answer(side.prepare(request["case"], request["part"]))
            except Exception as error:  # an older package may refuse what this one can do
                answer({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
