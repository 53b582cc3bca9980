"""The implementations that this machine can run, and the function that chooses one."""

from selfsup_kernels.core.backends import CHOICES, Unavailable, require, select, unavailable

__all__ = ["CHOICES", "Unavailable", "require", "select", "unavailable"]
