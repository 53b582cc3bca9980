"""Draw the curves of ``curves.json`` and say what was run, for ``tables.py``."""

from statistics import mean

from selfsup_kernels.lab.pages.figures import EAGER, OURS, figure

TITLES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "cmc": "CMC", "siglip": "SigLIP"}
TITLES |= {"byol_contrast": "BYOLContrast"}


def path(images, row):
    return images / f"curve-{row['method']}.png"


def shown(row):
    """Return what a picture shows, from which its digest is made."""
    return [row["pixels"], row["runs"]]


def picture(row):
    """Draw loss and accuracy by epoch, the mean of the seeds as a line and their range as a band."""
    made, axes = figure(4.2, 4.6, rows=2, sharex=True)
    loss, accuracy = axes[:, 0]
    runs = row["runs"]
    epochs = range(len(runs[0]["loss"]) + 1)
    curve(loss, epochs[1:], [run["loss"] for run in runs])
    curve(accuracy, epochs, [[100 * share for share in run["accuracy"]] for run in runs])
    untrained = 100 * mean(run["accuracy"][0] for run in runs)
    accuracy.axhline(100 * row["pixels"], color="#5b6770", linestyle="--", linewidth=1.4, label="raw pixels")
    accuracy.axhline(untrained, color=EAGER, linestyle=":", linewidth=1.8, label="before training")
    loss.set_title(f"{TITLES[row['method']]}: training loss", fontsize=10.5, loc="left")
    accuracy.set_title("accuracy of a linear probe (%)", fontsize=10.5, loc="left")
    accuracy.set_xlabel("epoch", fontsize=10)
    handles, labels = accuracy.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return made


def curve(axis, x, runs):
    low, high = ([pick(values) for values in zip(*runs, strict=True)] for pick in (min, max))
    axis.fill_between(x, low, high, color=OURS, alpha=0.2, linewidth=0)
    axis.plot(x, [mean(values) for values in zip(*runs, strict=True)], color=OURS, linewidth=2, label="trained")
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.tick_params(labelsize=10)


def percent(values):
    """Write the mean, and the range if there is one."""
    low, high, middle = min(values), max(values), mean(values)
    return f"{middle:.1%}" + (f" ({low:.1%} to {high:.1%})" if low != high else "")


def image(row, source):
    text = f"{TITLES[row['method']]} on digits: training loss and accuracy of a linear probe by epoch"
    return f'<img src="{source}" width="480" alt="{text}">'


def answer(row):
    """Return the accuracies in a few words."""
    after, before = ([run["accuracy"][at] for run in row["runs"]] for at in (-1, 0))
    pixels = f"{row['pixels']:.1%} from raw pixels of the same input"
    return f"{percent(after)} after training, {percent(before)} before it, and {pixels}"


def lines(header, row, source, device):
    """Return the image and the sentences below it, as lines of Markdown."""
    runs, used = row["runs"], header["settings"]
    sentences = [
        f"The networks of the example on scikit-learn's digits of 8 x 8 pixels: {len(runs[0]['loss'])} epochs of",
        f"{used['train']} images, batches of {used['batch']}, AdamW with a learning rate of {used['learning_rate']}.",
        f"The line is the mean of {len(runs)} seeds, the band their range. A linear probe, trained with",
        f"{used['labels']} labels of each class (mean over {used['draws']} draws), recognises this share of",
        f"{used['test']} other digits from {row['features']}: {answer(row)}. {device}",
        "`python benchmarks/curves.py --out FOLDER` repeats the run.",
    ]
    return [image(row, source), "", " ".join(sentences)]


def gallery(row, source):
    """Return the image and one sentence."""
    words = (
        f"[{TITLES[row['method']]}](methods/{row['method']}.md) on digits, accuracy of a linear probe: {answer(row)}."
    )
    return [image(row, source), "", words]
