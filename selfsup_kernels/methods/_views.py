"""Argument checks shared by the methods."""

from collections.abc import Sequence

from torch import nn


def collect_views(views: tuple) -> list:
    """Return ``(x1, x2, ...)``, or one sequence of them, as a list of at least two inputs."""
    if len(views) == 1:
        if not isinstance(views[0], Sequence) or isinstance(views[0], (str, bytes)):
            raise ValueError(f"views: expected at least 2, or a sequence of them, got one {type(views[0]).__name__}")
        views = views[0]
    if len(views) < 2:
        raise ValueError(f"views: expected at least 2, got {len(views)}")
    return list(views)


def require_modules(**modules) -> None:
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
