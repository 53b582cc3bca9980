"""The measurements of the command: how the peak grows, then a profile of every batch, in fresh processes."""

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


def run(plan) -> dict:
    """The results, as ``profile.json`` has them; traces are in ``plan.out`` then."""
    begin = time.monotonic()
    free = memory.free(plan.work.device)
    bound = min(plan.memory or free, free)
    growths, cases = {}, []
    with Progress(sys.stderr) as bar:
        for variant in VARIANTS:
            bar.stage(f"memory, {variant}", 5)
            work, budget = plan.work.of(variant=variant), GROWTH * plan.seconds / len(VARIANTS)
            try:
                growths[variant] = largest.measure(work, bound, plan.batches[0], budget, bar.advance)
            except fresh.Failed as error:
                words = f"training steps fail, {variant} at batch {plan.batches[0]}"
                raise SystemExit(f"profile: {words}:\n{error}") from None
        bar.stage("profiles", len(plan.batches) * len(VARIANTS))
        for batch in plan.batches:
            for variant in VARIANTS:
                left = plan.seconds - (time.monotonic() - begin)
                cases.append(_profile(plan, growths[variant], batch, variant, bound, free, left))
                bar.advance(f"batch {batch}, {variant}: {cases[-1]['reason'] or cases[-1]['status']}")
    return report.results(
        plan.work.device,
        workload={**plan.work.json(), "batches": plan.batches, "steps": plan.steps},
        cases=cases,
        largest={
            "limit_bytes": bound,
            "asked": plan.memory is not None,
            "variants": {variant: growth.json() for variant, growth in growths.items()},
        },
        seconds=time.monotonic() - begin,
    )


def _profile(plan, growth, batch, variant, bound, free, left) -> dict:
    case = {"batch": batch, "variant": variant, "status": "skipped", "reason": None, "summary": None, "trace": None}
    needed, seconds = growth.peak(batch), growth.seconds(batch)
    if growth.refused is not None and batch >= growth.refused:
        return {**case, "status": "out of memory", "reason": f"does not fit in {size(bound)}"}
    if needed is not None and needed > bound and batch > growth.points[-1]["batch"]:
        return {**case, "status": "does not fit", "reason": f"would take about {size(needed)} of {size(bound)}"}
    # The steps with marks and those without, two to warm up, one for memory, and two's time for the trace.
    expected = largest.STARTUP + (2 * plan.steps + 5) * (seconds or 0)
    if expected > left and batch > plan.batches[0]:
        return {**case, "reason": f"was left out, since its profile takes about {expected:.0f} s"}
    folder = Path(plan.out) / f"{variant}-{batch}"
    patience = max(300.0, 10 * expected)  # a hang ends
    try:
        summary = fresh.call(
            "selfsup_kernels.lab.profile.workload:profiled",
            plan.work.of(variant=variant, batch=batch).json(),
            plan.steps,
            str(folder.resolve()),
            memory_limit=free if plan.work.device == "cpu" else None,
            timeout=patience,
        )
    except fresh.OutOfMemory:
        return {**case, "status": "out of memory", "reason": f"does not fit in {size(free)}"}
    except subprocess.TimeoutExpired:
        return {**case, "reason": f"took more than {patience:.0f} s"}
    except fresh.Failed as error:
        return {**case, "status": "failed", "reason": str(error).strip().splitlines()[-1][:300]}
    trace = f"{folder.name}/trace.json" if (folder / "trace.json").exists() else None
    return {**case, "status": "measured", "summary": summary, "trace": trace}
