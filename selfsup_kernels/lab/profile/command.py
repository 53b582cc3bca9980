"""The measurements of the command: how the peak grows, then a profile of every batch, in fresh processes."""

import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.pages.progress import Progress
from selfsup_kernels.lab.profile import largest, memory, report
from selfsup_kernels.lab.profile.summary import size
from selfsup_kernels.lab.profile.workload import VARIANTS

GROWTH = 0.45
"""The share of the time that goes to the largest batch."""


def run(work, batches, steps, seconds, limit, out) -> dict:
    """The results, as ``profile.json`` has them; traces are in the folder ``out`` then.

    ``limit``: bytes for the largest batch, None for what is free; ``seconds``: about how long all of it may take.
    """
    begin = time.monotonic()
    free = memory.free(work.device)
    bound = min(limit or free, free)
    growths, cases = {}, []
    with Progress(sys.stderr) as bar:
        for variant in VARIANTS:
            bar.stage(f"memory, {variant}", 5)
            budget = GROWTH * seconds / len(VARIANTS)
            try:
                growths[variant] = largest.measure(work.of(variant=variant), bound, batches[0], budget, bar.advance)
            except fresh.Failed as error:
                words = f"training steps fail, {variant} at batch {batches[0]}"
                raise SystemExit(f"profile: {words}:\n{error}") from None
        bar.stage("profiles", len(batches) * len(VARIANTS))
        for batch, variant in itertools.product(batches, VARIANTS):
            left = seconds - (time.monotonic() - begin) if batch > batches[0] else math.inf
            case = _profile(work.of(variant=variant, batch=batch), growths[variant], steps, Path(out), free, left)
            cases.append({"batch": batch, "variant": variant, "reason": None, "summary": None, "trace": None} | case)
            bar.advance(f"batch {batch}, {variant}: {cases[-1]['reason'] or cases[-1]['status']}")
    return report.results(
        work.device,
        workload={**work.json(), "batches": batches, "steps": steps},
        cases=cases,
        largest={
            "limit_bytes": bound,
            "asked": limit is not None,
            "variants": {variant: growth.json() for variant, growth in growths.items()},
        },
        seconds=time.monotonic() - begin,
    )


def _profile(work, growth, steps, out, free, left) -> dict:
    """The status of one case, and its summary or the reason why there is none."""
    needed = growth.peak(work.batch)
    if growth.refused is not None and work.batch >= growth.refused:
        return {"status": "out of memory", "reason": f"does not fit in {size(growth.limit)}"}
    if needed is not None and needed > growth.limit and work.batch > growth.points[-1]["batch"]:
        return {"status": "does not fit", "reason": f"would take about {size(needed)} of {size(growth.limit)}"}
    # The steps with marks and those without, two to warm up, and two's time for the trace.
    expected = largest.STARTUP + (2 * steps + 4) * (growth.seconds(work.batch) or 0)
    if expected > left:
        return {"status": "skipped", "reason": f"was left out, since its profile takes about {expected:.0f} s"}
    folder, patience = out / f"{work.variant}-{work.batch}", max(300.0, 10 * expected)  # a hang ends
    target, under = "selfsup_kernels.lab.profile.workload:profiled", free if work.device == "cpu" else None
    arguments = work.json(), steps, str(folder.resolve())
    try:
        summary = fresh.call(target, *arguments, memory_limit=under, timeout=patience)
    except fresh.OutOfMemory:
        return {"status": "out of memory", "reason": f"does not fit in {size(free)}"}
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"took more than {patience:.0f} s"}
    except fresh.Failed as error:
        return {"status": "failed", "reason": str(error).strip().splitlines()[-1][:300]}
    trace = f"{folder.name}/trace.json" if (folder / "trace.json").exists() else None
    return {"status": "measured", "summary": summary, "trace": trace}
