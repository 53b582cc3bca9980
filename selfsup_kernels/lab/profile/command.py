"""Measure what the command reports: the largest batch, then a profile of every batch, in fresh processes."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

from selfsup_kernels.lab import fresh
from selfsup_kernels.lab.pages.progress import Progress
from selfsup_kernels.lab.profile import largest, memory, report
from selfsup_kernels.lab.profile.workload import VARIANTS

GROWTH = 0.45
"""The share of the time that goes to the largest batch."""


def run(work, batches, steps, seconds, limit, out) -> dict:
    """Return the results, as ``profile.json`` has them, and write traces into the folder ``out``.

    ``limit``: bytes for the largest batch, None for what is free; ``seconds``: about how long all of it may take.
    """
    begin, free = time.monotonic(), memory.free(work.device)
    bound = min(limit or free, free)
    growths, cases = {}, []
    with Progress(sys.stderr) as bar:
        for variant in VARIANTS:
            bar.stage(f"memory, {variant}", 8)
            budget = GROWTH * seconds / len(VARIANTS)
            try:
                growths[variant] = largest.measure(
                    work._replace(variant=variant), bound, batches[0], budget, bar.advance
                )
            except fresh.Failed as error:
                words = f"training steps fail, {variant} at batch {batches[0]}"
                raise SystemExit(f"profile: {words}:\n{error}") from None
        bar.stage("profiles", len(batches) * len(VARIANTS))
        for batch, variant in itertools.product(batches, VARIANTS):
            # The steps with marks and those without, two to warm up, and two's time for the trace.
            expected = largest.STARTUP + (2 * steps + 4) * growths[variant].seconds(batch)
            case = {"batch": batch, "variant": variant, "status": "skipped", "reason": None, "summary": None}
            if batch > batches[0] and expected > seconds - (time.monotonic() - begin):
                case |= {"trace": None, "reason": f"its profile takes about {expected:.0f} s"}
            else:
                case |= _profile(
                    work._replace(variant=variant, batch=batch), steps, Path(out), free, max(300, 10 * expected)
                )
            cases.append(case)
            bar.advance(f"batch {batch}, {variant}: {case['reason'] or case['status']}")
    return report.results(
        work.device,
        workload={**work._asdict(), "batches": batches, "steps": steps},
        cases=cases,
        largest={
            "limit_bytes": bound,
            "asked": limit is not None,
            "variants": {variant: growth.json() for variant, growth in growths.items()},
        },
        seconds=time.monotonic() - begin,
    )


def _profile(work, steps, out, free, patience) -> dict:
    """Return the status of one case, and its summary or the reason why there is none."""
    folder = out / f"{work.variant}-{work.batch}"
    target, under = "selfsup_kernels.lab.profile.workload:profiled", free if work.device == "cpu" else None
    found = {"status": "measured", "trace": None}
    try:
        arguments = work._asdict(), steps, str(folder.resolve())
        found["summary"] = fresh.call(target, *arguments, memory_limit=under, timeout=patience)
    except fresh.OutOfMemory:
        return found | {"status": "out of memory", "reason": f"does not fit in {report.size(free)}"}
    except subprocess.TimeoutExpired:
        return found | {"status": "skipped", "reason": f"took more than {patience:.0f} s"}
    except fresh.Failed as error:
        return found | {"status": "failed", "reason": str(error).strip().splitlines()[-1][:300]}
    if (folder / "trace.json").exists():
        found["trace"] = f"{folder.name}/trace.json"
    return found
