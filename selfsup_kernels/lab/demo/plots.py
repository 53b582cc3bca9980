"""The pictures of the report. Each function returns a matplotlib figure."""

import numpy as np

from selfsup_kernels.lab.demo.run import TITLES
from selfsup_kernels.lab.demo.train import TIMES
from selfsup_kernels.lab.pages.figures import EAGER, OURS, figure, log_axis

COLORS = dict(zip(TIMES, ("#8fa3b8", OURS, "#3a9d6e", "#c9b458"), strict=True))


def curve(axis, runs, title):
    steps = np.arange(1, len(runs["ours"]) + 1)
    axis.plot(steps, runs["ours"], color=OURS, linewidth=3, alpha=0.55, label="ours")
    axis.plot(steps, runs["eager"], color=EAGER, linewidth=1.2, linestyle=(0, (4, 3)), label="eager")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=9)


def curves(losses):
    made, axes = figure(8.0, 3.4, len(losses))
    for axis, (name, runs) in zip(axes[0], losses.items(), strict=True):
        curve(axis, runs, TITLES[name])
    return made


def step_time(times):
    """Stacked bars; ``times``: label -> part -> seconds."""
    made, axes = figure(7.2, 0.52 * len(times) + 1.3)
    axis, left = axes[0, 0], np.zeros(len(times))
    for part, color in COLORS.items():
        values = np.array([1e3 * row.get(part, 0.0) for row in times.values()])
        axis.barh(range(len(times)), values, left=left, color=color, label=part.replace("ema", "EMA"), height=0.62)
        left += values
    axis.set_yticks(range(len(times)), times)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds of a step")
    made.legend(loc="outside upper center", ncols=len(COLORS), frameon=False, fontsize=9)
    return made


def sweep_axes(axes, rows):
    """Time and memory over the batch size, on two axes."""
    for axis, key, unit, title in (
        (axes[0], "seconds", 1e-3, "Time of the loss, forward + backward (ms)"),
        (axes[1], "peak_bytes", 2**20, "Peak memory of the loss (MiB)"),
    ):
        shown = []
        for name, color, marker in (("eager", EAGER, "s"), ("ours", OURS, "o")):
            known = [(row["batch"], row[key][name] / unit) for row in rows if row[key].get(name)]
            if known:
                axis.loglog(*zip(*known, strict=True), color=color, marker=marker, markersize=5, label=name)
                shown += [value for _, value in known]
        axis.set_title(title, fontsize=11)
        if shown:
            axis.set_xticks([row["batch"] for row in rows], [row["batch"] for row in rows])
            log_axis(axis.yaxis, shown)
            axis.legend(frameon=False, fontsize=9)
        axis.set_xlabel("batch size (4 views)")


def sweep(rows):
    made, axes = figure(8.0, 3.8, 2)
    sweep_axes(axes[0], rows)
    return made


def compact(losses, rows, device):
    """The README's picture: the contrastive curves, time and memory of the loss over the batch size."""
    made, axes = figure(12.0, 3.7, 3)
    curve(axes[0, 0], losses["contrastive"], "Contrastive training on digits")
    sweep_axes(axes[0, 1:], rows)
    made.supxlabel(device, fontsize=8, color="#52606d")
    return made
