"""What the command does: measure how the peak grows, then profile every batch, ours and eager, in fresh processes."""

import subprocess
import sys
import time
from pathlib import Path

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.pages.progress import Progress
from selfsup_kernels.lab.profile import findings, header, largest, limit
from selfsup_kernels.lab.profile.summary import size
from selfsup_kernels.lab.profile.workload import VARIANTS

ENOUGH = 2.0
"""Seconds of steps with marks; quick steps are repeated until they make up as much, since they scatter the most."""
MOST = 60
"""Steps with marks at most."""
SHARES = {"ours": 0.3, "eager": 0.6}
"""Of the time that is left, what a case may take: the large ones come first, and eager's after ours."""
GROWTH = 0.45
"""The share of the time that goes to the largest batch."""


def run(plan) -> dict:
    """The results, as ``profile.json`` has them; traces are in ``plan.out`` then."""
    begin = time.monotonic()
    free = limit.default(plan.device)
    bound = min(plan.memory, free) if plan.memory else free
    growths, cases = {}, []
    with Progress(sys.stderr) as bar:
        for variant in VARIANTS:
            bar.stage(f"memory, {variant}", 5)
            growths[variant] = _grow(plan, variant, bound, bar)
        bar.stage("profiles", len(plan.batches) * len(VARIANTS))
        # The answer is about the largest batch: it comes first, as long as there is time.
        for batch in reversed(plan.batches):
            for variant in VARIANTS:
                left = plan.seconds - (time.monotonic() - begin)
                cases.append(_profile(plan, growths[variant], batch, variant, bound, free, SHARES[variant] * left))
                bar.advance(f"batch {batch}, {variant}: {cases[-1]['reason'] or cases[-1]['status']}")
    cases.sort(key=lambda case: (case["batch"], VARIANTS.index(case["variant"])))
    results = {
        "format": "selfsup_kernels.profile",
        "version": 1,
        "header": header.collect(plan.device),
        "workload": {**plan.work.json(), "batches": plan.batches, "steps": plan.steps},
        "cases": cases,
        "largest": {
            "limit_bytes": bound,
            "asked": plan.memory is not None,
            "variants": {variant: growth.json() for variant, growth in growths.items()},
        },
        "seconds": time.monotonic() - begin,
    }
    return {**results, "answer": findings.answer(results), "findings": findings.findings(results)}


def _grow(plan, variant, bound, bar):
    work = plan.work.of(variant=variant)
    budget = GROWTH * plan.seconds / len(VARIANTS)
    try:
        return largest.measure(work, bound, plan.batches[0], budget, lambda note: bar.advance(note))
    except fresh.Failed as error:
        raise SystemExit(f"profile: training steps fail, {variant} at batch {plan.batches[0]}:\n{error}") from None


def _profile(plan, growth, batch, variant, bound, free, budget) -> dict:
    case = {"batch": batch, "variant": variant, "status": "skipped", "reason": None, "summary": None, "trace": None}
    needed, seconds = growth.peak(batch), growth.seconds(batch)
    if growth.refused is not None and batch >= growth.refused:
        return {**case, "status": "out of memory", "reason": f"does not fit in {size(bound)}"}
    if needed is not None and needed > bound and batch > growth.points[-1]["batch"]:
        return {**case, "status": "does not fit", "reason": f"would take about {size(needed)} of {size(bound)}"}
    steps = plan.steps
    if seconds is not None:
        steps = max(steps, min(MOST, int(ENOUGH / seconds)))
        # Besides the steps with marks and those without: two to warm up, one for memory, two's time for the trace.
        affordable = int(((budget - growth.startup) / seconds - 5) / 2)
        steps = max(2, min(steps, affordable))
        expected = growth.startup + (2 * steps + 5) * seconds
        if expected > 1.2 * budget and batch > plan.batches[0]:
            return {**case, "reason": f"was left out, since its profile takes about {expected:.0f} s"}
    folder = Path(plan.out) / f"{variant}-{batch}"
    work = plan.work.of(variant=variant, batch=batch).json()
    under = free if plan.device == "cpu" else None
    # A machine may be much slower than it was a moment ago; a hang is worth no more than this.
    patience = max(120.0, 10 * budget)
    try:
        summary = fresh.call(
            "selfsup_kernels.lab.profile.workload:profiled",
            work,
            steps,
            str(folder.resolve()),
            memory_limit=under,
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
