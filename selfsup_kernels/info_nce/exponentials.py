"""Exponentials of scores, in the dtype of the scores and with the accuracy of float64 tables."""

import torch


def log_sum_exp_(scores):
    """Return the log-sum-exp over the last dimension, in float64, and overwrite the scores.

    Rounded to float32 at scores of 1 / temperature, it would give probabilities that do not sum to one, and the
    gradient of the temperature is a difference of scores.
    """
    largest = scores.amax(-1, keepdim=True)
    largest = torch.where(largest.isinf(), 0, largest)
    return scores.sub_(largest).exp_().sum(-1).double().log_().add_(largest.squeeze(-1))


def weighted(scores, high, factor):
    """Return ``factor exp(high + scores)``, with the tables of ``exponents``."""
    return (scores + high).exp_().mul_(factor)


def exponents(logw, g, dtype):
    """Return (high, factor) with ``factor exp(high) = g exp(logw)``, for :func:`weighted`."""
    high, low = split(logw, dtype)
    return high, (g * low.exp()).to(dtype)


def minus(n, scores):
    high, low = split(n, scores.dtype)
    return (high - scores).add_(low.to(scores.dtype))


def split(x, dtype):
    """Split float64 numbers into ``high``, their rounding to ``dtype``, and the rest.

    Rounding -100 to float32 alone changes all probabilities of an anchor by up to 4e-6 of their value, and the gradient
    of the temperature is a difference of scores.
    """
    x = x.clamp(min=-(2.0**100))  # instead of -inf, since -inf - (-inf) is NaN
    high = x.to(dtype)
    return high, x - high
