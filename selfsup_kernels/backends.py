"""What this machine can run, and the one place that chooses an implementation."""

from selfsup_kernels.core.backends import CHOICES, Unavailable, require, select, unavailable

__all__ = ["CHOICES", "Unavailable", "require", "select", "unavailable"]
