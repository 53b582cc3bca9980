"""Train every method on scikit-learn's digits and record its loss and the accuracy of its features by epoch.

    python benchmarks/curves.py [--method NAME ...] [--epochs N] [--seeds N] [--out FOLDER]

Data, views, networks and learning rate are those of ``examples/``. A linear probe judges the encoder's features on
held-out digits: logistic regression of 10 labelled training images of each class, mean over 5 draws of them. It judges
raw pixels and the encoder before training in the same way. ``benchmarks/tables.py`` draws the pictures.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package of this checkout
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cmc
import digits
import torch
from digits import DIM, encoder, half_tower, head
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import selfsup_kernels as sk

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-3
BATCH = 256
LABELS, DRAWS = 10, 5


class Plain:
    """A method with one encoder of whole images."""

    features = "the encoder's features"

    def __init__(self, make, num_views=2):
        self.make, self.num_views = make, num_views

    view = staticmethod(digits.augment)

    def batch(self, views):
        return views

    def judged(self, method):
        """Return the network whose features are judged."""
        return method.encoder

    def images(self, images):
        """Return the network's input."""
        return images


class Edges(Plain):
    """CMC: an image and its edges, with an encoder each; the images' encoder is judged."""

    features = "the features of the images' encoder"

    def batch(self, views):
        return [views[0], cmc.edges(views[1])]

    def judged(self, method):
        return method.encoder[0]


class Halves(Plain):
    """SigLIP: the left and the right half of an image; the tower of the left halves is judged."""

    features = "the features of the left halves alone"

    view = staticmethod(lambda images: images)

    def batch(self, views):
        return views[0].split(4, dim=3)

    def judged(self, method):
        return method.image_tower

    def images(self, images):
        return images[..., :4]


METHODS = {
    "simclr": Plain(lambda: sk.methods.SimCLR(encoder(), head(), temperature=0.5)),
    "moco": Plain(lambda: sk.methods.MoCo(encoder(), head(), queue_size=1024, momentum=0.99, temperature=0.2)),
    "byol": Plain(lambda: sk.methods.BYOL(encoder(), head(), head(DIM), momentum=0.98)),
    "cmc": Edges(lambda: sk.methods.CMC([encoder(1), encoder(2)], [head(), head()], temperature=0.2)),
    "siglip": Halves(lambda: sk.methods.SigLIP(half_tower(), half_tower()), num_views=1),
    "byol_contrast": Plain(
        lambda: sk.methods.BYOLContrast(encoder(), head(), head(DIM), 0.98, temperature=0.2, contrast_weight=0.5), 3
    ),
}


@torch.no_grad()
def accuracy(network, images):
    """Return the share of the test digits that a linear probe recognises; see the top of this file."""
    training = network.training
    network.eval()
    x, y, x_test, y_test = digits.load()
    z, z_test = (network(images(part)).flatten(1).numpy() for part in (x, x_test))
    network.train(training)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        order = torch.randperm(len(y), generator=generator)
        labelled = torch.cat([order[y[order] == digit][:LABELS] for digit in range(10)])
        shares.append(probe.fit(z[labelled], y[labelled]).score(z_test, y_test))
    return sum(shares) / DRAWS


def train(plan, seed, epochs):
    """Return ``{"seed", "loss": of each epoch, "accuracy": before the first epoch and after each}``."""
    torch.manual_seed(seed)
    method = plan.make()
    batches = digits.loader(digits.load()[0], BATCH, num_views=plan.num_views, view=plan.view)
    optimizer = torch.optim.AdamW(method.parameters(), LEARNING_RATE)
    run = {"seed": seed, "loss": [], "accuracy": [accuracy(plan.judged(method), plan.images)]}
    for _ in range(epochs):
        losses = []
        for views in batches:
            loss = method(*plan.batch(views))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(method, "update_target"):
                method.update_target()
            losses.append(loss.item())
        run["loss"].append(sum(losses) / len(losses))
        run["accuracy"].append(accuracy(plan.judged(method), plan.images))
    return run


def main(arguments=None):
    from selfsup_kernels.lab.bench import results, timing

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write curves.json there")
    options = parser.parse_args(arguments)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    images, _, test, _ = digits.load()
    settings = {"train": len(images), "test": len(test), "batch": BATCH, "learning_rate": LEARNING_RATE}
    settings |= {"labels": LABELS, "draws": DRAWS}
    header = results.header(timing.Clock("cpu"), compared=()) | {"commit": commit.strip(), "settings": settings}
    path = options.out / "curves.json" if options.out else None
    rows = json.loads(path.read_text())["rows"] if path and path.exists() else []  # of methods that do not run now
    for name in options.method:
        plan = METHODS[name]
        pixels = accuracy(nn.Flatten(), plan.images)
        row = {"method": name, "features": plan.features, "pixels": pixels, "runs": []}
        for seed in range(options.seeds):
            row["runs"].append(train(plan, seed, options.epochs))
            run = row["runs"][-1]
            print(
                f"{name}, seed {seed}: loss {run['loss'][0]:.3f} to {run['loss'][-1]:.3f}, accuracy"
                f" {run['accuracy'][0]:.3f} to {run['accuracy'][-1]:.3f}, of raw pixels {row['pixels']:.3f}",
                flush=True,
            )
        made = {found["method"]: found for found in [*rows, row]}
        rows = [made[method] for method in METHODS if method in made]
        if path:
            results.write_json(path, header, rows)


if __name__ == "__main__":
    main()
