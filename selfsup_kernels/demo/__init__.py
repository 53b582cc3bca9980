"""``python -m selfsup_kernels demo``: real images, eager losses against ours, one HTML report."""

import sys
import warnings

from selfsup_kernels import _report

NEEDS = ("numpy", "sklearn", "matplotlib", "rich", "jinja2", "psutil")
"""What the demo imports beyond the package's own dependencies, as the extra ``demo`` has it."""


def missing() -> list[str]:
    return _report.missing(NEEDS)


def main(out="out/demo", seed=0, quick=False, figure=None) -> int:
    absent = missing()
    if absent:
        print(f"demo: {', '.join(absent)} missing; run: {_report.install(absent)}", file=sys.stderr)
        return 1
    from selfsup_kernels.demo import report, story

    warnings.filterwarnings("ignore", category=FutureWarning)
    results = story.run(seed=seed, quick=quick)
    report.write(results, out, figure)
    return 0
