"""``python -m selfsup_kernels demo``: real images, eager losses against ours, one HTML report."""

import sys
import warnings
from pathlib import Path

from selfsup_kernels.core import info


def main(out="out/demo", seed=0, quick=False, figure=None) -> int:
    absent = info.missing("demo")
    if absent:
        print(f"demo: {', '.join(absent)} missing; run: {info.install(absent)}", file=sys.stderr)
        return 1
    from selfsup_kernels.lab.demo import plots, report, run

    minutes, short = (f"{max(1, round(run.seconds(q) / 60))} min" for q in (False, True))
    about = f"quick: about {short}" if quick else f"about {minutes}; --quick (make demo QUICK=1): {short}"
    print(f"The demo on 2 cores, {about}.", flush=True)
    picture = Path(out) / "loss.png"

    def on_sweep(cases):
        plots.save(picture, list(plots.sweep(cases)))
        return f"First picture, which grows with each batch size: {picture.resolve()}" if len(cases) == 2 else None

    warnings.filterwarnings("ignore", category=FutureWarning)
    report.write(run.run(seed=seed, quick=quick, on_sweep=on_sweep), out, figure)
    return 0
