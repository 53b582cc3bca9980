"""Frozen features judged on held-out digits: a linear probe and nearest neighbours, with few labels and with all.

The test digits are read twice: as they are, and moved (turned, shifted, scaled at random, one fixed draw). Everything
is compared image by image, so that a difference can be told from chance.
"""

import math
import warnings

import numpy as np
import torch

from selfsup_kernels.lab.demo import data

FEW = 10
DRAWS = 10
COPIES = 8
CASES = tuple(
    (test, labels, probe) for test in ("clean", "moved") for labels in ("few", "all") for probe in ("linear", "knn")
)


class Evaluation:
    """Fits the probes on features of the training digits, scores them on features of the test digits."""

    def __init__(self, digits: data.Digits, seed=0, draws=DRAWS):
        self.digits = digits
        self.moved = data.warp(digits.test, torch.Generator().manual_seed(1))
        self.labels, self.test_labels = digits.train_labels.numpy(), digits.test_labels.numpy()
        rng = np.random.default_rng(seed)
        classes = [np.flatnonzero(self.labels == c) for c in np.unique(self.labels)]
        self.few = [np.concatenate([rng.permutation(rows)[:FEW] for rows in classes]) for _ in range(draws)]
        self.correct = {}
        """Name of the features -> case -> for each test image, the share of draws in which it was recognised."""

    def add(self, name, features, copies=0):
        """``features`` maps images to a matrix. With ``copies``, each labelled image also comes that often moved."""
        generator = torch.Generator().manual_seed(2)
        images = [self.digits.train] + [data.warp(self.digits.train, generator) for _ in range(copies)]
        train = [features(x) for x in images]
        tests = {"clean": features(self.digits.test), "moved": features(self.moved)}
        self.correct[name] = {}
        for labels, draws in (("few", self.few), ("all", [np.arange(len(self.labels))])):
            hits = {case: [] for case in CASES if case[1] == labels}
            for rows in draws:
                x, y = np.concatenate([f[rows] for f in train]), np.tile(self.labels[rows], len(train))
                for probe, model in (("linear", _linear()), ("knn", _knn(labels))):
                    model.fit(x, y)
                    for test, f in tests.items():
                        hits[test, labels, probe].append(model.predict(f) == self.test_labels)
            for case, rows in hits.items():
                self.correct[name][case] = np.mean(rows, axis=0)

    def accuracy(self, name) -> dict:
        return {case: float(hits.mean()) for case, hits in self.correct[name].items()}

    def verdict(self, name, other, case) -> str:
        """``better`` or ``worse`` where the paired difference exceeds two standard errors, else ``no difference``."""
        difference = self.correct[name][case] - self.correct[other][case]
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        mean = float(difference.mean())
        if abs(mean) <= 2 * error:
            return "no difference"
        return "better" if mean > 0 else "worse"


def _linear():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    class Probe(LogisticRegression):
        def fit(self, *arguments):
            with warnings.catch_warnings():
                # Separable features have no finite optimum to converge to; the iterations are the regulariser.
                warnings.simplefilter("ignore")
                return super().fit(*arguments)

    return make_pipeline(StandardScaler(), Probe(max_iter=200))


def _knn(labels):
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1 if labels == "few" else 5, metric="cosine")


def pixels(images) -> np.ndarray:
    return images.flatten(1).numpy()


def frozen(encoder):
    """The encoder's features as a function of images."""

    @torch.no_grad()
    def features(images):
        training = encoder.training
        encoder.eval()
        out = encoder(images).numpy()
        encoder.train(training)
        return out

    return features
