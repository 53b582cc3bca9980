"""Whether one version is slower than another, judged by the noise of the same run.

Two processes of the base and one of the candidate take turns; what the two equal processes differ by is the noise.
Processes differ from each other for as long as they live (where their memory lies, for one), so all three are started
anew a few times, and only what shows in every launch counts.
"""

import math
from statistics import median

FLOOR = 0.02
"""Ratios nearer to 1 than this are never flagged."""


def judge(launches) -> dict:
    """What the turns of all launches say of one case.

    Args:
        launches: for each launch a list of turns ``(base, base again, candidate)``, in any unit of time.

    Returns:
        ``ratio`` (candidate over base: above 1 is slower), ``noise`` (how far from 1 a ratio of equals may lie),
        ``verdict``: "slower", "faster" or "same".
    """
    ratios, noises = [], []
    for turns in launches:
        ours = [math.log(new / math.sqrt(a * b)) for a, b, new in turns]
        equal = [math.log(b / a) for a, b, _ in turns]
        ratios.append(median(ours))
        noises.append(abs(median(equal)) + 3 * _standard_error(ours))
    center, noise = median(ratios), max(noises)
    limit = max(noise, math.log1p(FLOOR))
    verdict = "same"
    if min(ratios) > limit:
        verdict = "slower"
    elif max(ratios) < -limit:
        verdict = "faster"
    return {"ratio": math.exp(center), "noise": math.expm1(noise), "verdict": verdict}


def _standard_error(values) -> float:
    """Of their median, from their median absolute deviation: a few turns that something else disturbed weigh little."""
    center = median(values)
    spread = 1.4826 * median(abs(v - center) for v in values)
    return 1.2533 * spread / math.sqrt(len(values))
