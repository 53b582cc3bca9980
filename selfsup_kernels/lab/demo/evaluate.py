"""Evaluate frozen features on held-out digits: a linear probe and nearest neighbours, with few labels and with all."""

import warnings
from statistics import NormalDist

import numpy as np
import torch

FEW = 10
DRAWS = 10
CASES = {
    "few/linear": f"{FEW} labels a class, linear probe",
    "few/knn": f"{FEW} labels a class, nearest neighbour",
    "all/linear": "all labels, linear probe",
    "all/knn": "all labels, 5 nearest neighbours",
}


@torch.no_grad()
def recognized(digits, encoder, seed=0, draws=DRAWS) -> dict:
    """Return case -> for each test digit whether it is recognized; with few labels the mean over ``draws`` of them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, test_labels = digits.train_labels.numpy(), digits.test_labels.numpy()
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    few = [np.concatenate([rng.permutation(rows)[:FEW] for rows in classes]) for _ in range(draws)]
    encoder.eval()
    x, x_test = encoder(digits.train).numpy(), encoder(digits.test).numpy()
    found = {}
    for case in CASES:
        if case.endswith("linear"):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        else:
            model = KNeighborsClassifier(1 if case.startswith("few") else 5, metric="cosine")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # separable features have no finite optimum; the iterations regularise
            subsets = few if case.startswith("few") else [np.arange(len(labels))]
            scores = [model.fit(x[rows], labels[rows]).predict(x_test) == test_labels for rows in subsets]
        found[case] = np.mean(scores, axis=0)
    return found


def differences(ours, eager, comparisons) -> dict:
    """Compare what :func:`recognized` returns for two encoders, digit by digit.

    Returns:
        case -> mean difference, its standard error over the digits, and whether it is significant: beyond what equally
        good features show in one of 20 reports with so many ``comparisons`` (Bonferroni).
    """
    limit, found = NormalDist().inv_cdf(1 - 0.05 / 2 / comparisons), {}
    for case in ours:
        pairs = ours[case] - eager[case]
        mean, error = float(pairs.mean()), float(pairs.std(ddof=1) / len(pairs) ** 0.5)
        found[case] = {"difference": mean, "standard_error": error, "significant": abs(mean) > limit * error}
    return found
