"""Measure where the time and the memory of training steps go: :func:`steps`, and the command ``profile``."""

from selfsup_kernels.lab.profile.parts import PARTS
from selfsup_kernels.lab.profile.steps import Run, steps

__all__ = ["PARTS", "Run", "steps"]
