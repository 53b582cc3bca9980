"""The pictures of the report. Each function returns a matplotlib figure; nothing here touches global state."""

import numpy as np

from selfsup_kernels.lab.pages.figures import EAGER, OURS, figure, log_axis

PARTS = {"encoder": "#8fa3b8", "loss": OURS, "ema": "#3a9d6e", "optimizer": "#c9b458"}
ROUNDING = 2.0**-24
TITLES = {"contrastive": "Contrastive, 4 views", "byol": "BYOL, 2 views"}


def views(images, augmented):
    """One row per digit: as it is, then its views."""
    made, axes = figure(6.4, 1.06 * len(images), 1 + len(augmented), len(images))
    for row, image in enumerate(images):
        for column, picture in enumerate([image, *(view[row] for view in augmented)]):
            axis = axes[row, column]
            axis.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_color("#1f2933" if column == 0 else "#c3ccd5")
            if row == 0:
                axis.set_title("digit" if column == 0 else f"view {column}", fontsize=10)
    return made


def curve(axis, runs, title):
    """Both losses over the steps: ours as a line, eager dashed over it."""
    steps = np.arange(1, len(runs["ours"]) + 1)
    axis.plot(steps, runs["ours"], color=OURS, linewidth=3, alpha=0.55, label="ours")
    axis.plot(steps, runs["eager"], color=EAGER, linewidth=1.2, linestyle=(0, (4, 3)), label="eager")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=9)


def curves(runs, control, title):
    """Above: the curves on top of each other. Below: their relative difference, step by step, and the control's."""
    made, axes = figure(5.4, 5.0, 1, 2, height_ratios=(1.7, 1))
    curve(axes[0, 0], runs, title)
    axis = axes[1, 0]
    eager = np.array(runs["eager"])
    for other, color, label in ((control, "#d8b48a", "eager, last bit changed"), (runs["ours"], OURS, "ours")):
        difference = np.maximum(np.abs(np.array(other) - eager) / np.abs(eager), 1e-9)
        axis.semilogy(np.arange(1, len(eager) + 1), difference, color=color, linewidth=1, label=label)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    axis.axhline(ROUNDING, color="#9aa5b1", linewidth=1, linestyle=":")
    axis.annotate(
        "float32 rounding", (1, ROUNDING), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )
    axis.set_xlabel("step")
    axis.set_ylabel("relative difference\nfrom eager")
    return made


def accuracies(table, names, title):
    """Horizontal bars for one case of the evaluation; ``table``: name -> accuracy."""
    made, axes = figure(5.4, 0.44 * len(names) + 0.8)
    axis = axes[0, 0]
    values = [table[name] for name in names]
    colors = [OURS if "ours" in n else EAGER if "eager" in n else "#9aa5b1" for n in names]
    bars = axis.barh(range(len(names)), values, color=colors, height=0.66)
    axis.bar_label(bars, [f"{100 * v:.1f} %" for v in values], padding=3, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title(title, fontsize=11, loc="left")
    return made


def embedding(points, labels):
    """``points``: title -> (n, 2)."""
    made, axes = figure(8.0, 8.2, 2, 2)
    for axis, (title, xy) in zip(axes.flat, points.items(), strict=True):
        dots = axis.scatter(xy[:, 0], xy[:, 1], c=labels, cmap="tab10", s=9, linewidths=0)
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    handles, names = dots.legend_elements()
    made.legend(handles, names, loc="outside lower center", ncols=10, frameon=False, handletextpad=0.1, columnspacing=1)
    return made


def step_time(times):
    """Stacked bars; ``times``: label -> part -> seconds."""
    made, axes = figure(7.2, 0.52 * len(times) + 1.3)
    axis = axes[0, 0]
    left = np.zeros(len(times))
    for part, color in PARTS.items():
        values = np.array([1e3 * row.get(part, 0.0) for row in times.values()])
        axis.barh(range(len(times)), values, left=left, color=color, label=part.replace("ema", "EMA"), height=0.62)
        left += values
    axis.set_yticks(range(len(times)), times)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds per step (median)")
    made.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    return made


def sweep_axis(axis, rows, key, unit, title):
    shown = []
    for name, color, marker in (("eager", EAGER, "s"), ("ours", OURS, "o")):
        known = [(row["batch"], row[key][name] / unit) for row in rows if row[key].get(name)]
        if known:
            axis.loglog(*zip(*known, strict=True), color=color, marker=marker, markersize=5, label=name)
            shown += [value for _, value in known]
    axis.set_title(title, fontsize=11)
    if not shown:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    batches = [row["batch"] for row in rows]
    axis.set_xticks(batches, batches)
    log_axis(axis.yaxis, shown)
    axis.set_xlabel("batch size (4 views)")
    axis.legend(frameon=False, fontsize=9)


SWEEPS = {
    "seconds": (1e-3, "Time of the loss, forward + backward (ms)"),
    "peak_bytes": (2**20, "Peak memory of the loss (MiB)"),
}


def sweep(rows, key):
    made, axes = figure(5.4, 3.8)
    sweep_axis(axes[0, 0], rows, key, *SWEEPS[key])
    return made


def compact(losses, rows, device):
    """The README's picture: the contrastive curves, time and memory of the loss over the batch size."""
    made, axes = figure(12.0, 3.7, 3)
    curve(axes[0, 0], losses["contrastive"], "Contrastive training on digits")
    for axis, key in zip(axes[0, 1:], SWEEPS, strict=True):
        sweep_axis(axis, rows, key, *SWEEPS[key])
    made.supxlabel(device, fontsize=8, color="#52606d")
    return made
