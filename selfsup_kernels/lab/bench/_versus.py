"""Time workloads on the package of a given source tree, in a process of its own.

    python _versus.py TREE WORKLOADS DEVICE SECONDS < cases.json > times.json

``cases.json`` is a list of (parameters of a case, part). Nothing here, nor in ``workloads.py``, needs more of the
package than its public functions: the other tree may be older than this file.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path


def main(tree, workloads, device, seconds):
    sys.path[0] = tree  # in place of this file's folder: the package of that tree, before any that is installed
    import torch
    from torch.utils.benchmark import Timer

    import selfsup_kernels as sk

    if not Path(sk.__file__).resolve().is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"imported {sk.__file__}, which is not in {tree}")
    spec = importlib.util.spec_from_file_location("versus_workloads", workloads)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = []
    for parameters, part in json.load(sys.stdin):
        try:
            case = module.case(**parameters)
            names = {"run": case.run, "part": part, "ours": case.ours("auto"), "inputs": case.inputs(device)}
            timer = Timer("run(part, ours, inputs)", globals=names, num_threads=torch.get_num_threads())
            timer.timeit(3)
            rows.append(1e3 * timer.blocked_autorange(min_run_time=float(seconds)).median)
        except Exception as error:  # an older package may refuse what this one can do
            rows.append(f"{type(error).__name__}: {error}")
    return {"impl": sk.backends.select("auto", torch.empty(0, device=device)), "torch": torch.__version__, "rows": rows}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = main(*sys.argv[1:])
    print(json.dumps(answer))
