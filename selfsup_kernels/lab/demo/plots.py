"""Draw the pictures of the report. Each function returns a matplotlib figure."""

import numpy as np

from selfsup_kernels.lab.demo.run import TITLES
from selfsup_kernels.lab.pages.figures import EAGER, OURS, figure, log_axis


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


def sweep_axes(axes, rows):
    """Draw time and memory over the batch size, on two axes."""
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
    """Draw the README's picture: the contrastive curves, time and memory of the loss over the batch size."""
    made, axes = figure(12.0, 3.7, 3)
    curve(axes[0, 0], losses["contrastive"], "Contrastive training on digits")
    sweep_axes(axes[0, 1:], rows)
    made.supxlabel(device, fontsize=8, color="#52606d")
    return made
