"""``python -m selfsup_kernels demo``: real images, eager losses against ours, one HTML report."""

import sys
import warnings

from selfsup_kernels.core import info


def main(out="out/demo", seed=0, quick=False, figure=None) -> int:
    absent = info.missing("demo")
    if absent:
        print(f"demo: {', '.join(absent)} missing; run: {info.install(absent)}", file=sys.stderr)
        return 1
    from selfsup_kernels.lab.demo import report, run

    warnings.filterwarnings("ignore", category=FutureWarning)
    report.write(run.run(seed=seed, quick=quick), out, figure)
    return 0
