"""Draw the panels of the report: a text for each, and a function that draws it on an axis."""

from functools import partial
from pathlib import Path

from selfsup_kernels.lab.demo import run
from selfsup_kernels.lab.pages.figures import EAGER, OURS, figure, log_axis

COLORS = {"eager": EAGER, "ours": OURS}


def sweep(cases):
    """Yield a text and what draws it on an axis: time and memory of the contrastive loss alone over the batch size."""
    for key, unit, title in (
        ("seconds", 1e-3, "Time of the loss (ms)"),
        ("peak_bytes", 1e6, "Peak memory of the loss (MB)"),
    ):
        yield f"{title} over the batch size", partial(_sweep, cases=cases, key=key, unit=unit, title=title)


def curves(losses):
    for name, runs in losses.items():
        title = f"{run.TITLES[name]} training on digits"
        yield f"{title}: the loss over the steps, ours and eager", partial(_curves, runs=runs, title=title)


def _sweep(axis, cases, key, unit, title):
    lines = {
        name: [(case["batch"], case[key][name] / unit) for case in cases if case[key].get(name)] for name in COLORS
    }
    lines = {name: known for name, known in lines.items() if known}
    for name, known in lines.items():
        axis.loglog(*zip(*known, strict=True), color=COLORS[name], marker="os"[name == "eager"], markersize=5)
        # Lines rise: above the last point of the upper one and below the first of the lower one there is room.
        upper = known[0] == max(other[0] for other in lines.values())
        end, place = (known[-1], {"xytext": (-4, 8)}) if upper else (known[0], {"xytext": (6, -14)})
        place |= {"ha": "right" if upper else "left", "textcoords": "offset points"}
        axis.annotate(name, end, color=COLORS[name], weight="bold", **place)
    shown = [value for known in lines.values() for _, value in known]
    if shown:
        axis.set_xticks([case["batch"] for case in cases], [case["batch"] for case in cases])
        log_axis(axis.yaxis, shown)
        axis.margins(y=0.16)
    axis.set(xlabel=f"batch size ({run.VIEWS} views)")
    axis.set_title(title, fontsize=10, loc="left")


def _curves(axis, runs, title):
    steps = range(1, len(runs["ours"]) + 1)
    axis.plot(steps, runs["ours"], color=COLORS["ours"], linewidth=3.5, alpha=0.6, label="ours")
    axis.plot(steps, runs["eager"], color=COLORS["eager"], linewidth=1.2, linestyle=(0, (4, 3)), label="eager, dashed")
    axis.set(xlabel="step", ylabel="loss")
    axis.set_title(title, fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def drawn(draws, columns=1):
    made, axes = figure(4.0 * columns, 3.0 * (len(draws) // columns), columns, len(draws) // columns)
    for axis, draw in zip(axes.flat, draws, strict=True):
        draw(axis)
    return made


def save(path, panels, note=""):
    """Write one picture of all panels, two in a row."""
    made = drawn([draw for _, draw in panels], columns=2)
    made.supxlabel(note, fontsize=8, color="#52606d")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=144)
