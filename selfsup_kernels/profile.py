"""Measure where the time and memory of training steps go: :func:`steps`, and ``python -m selfsup_kernels profile``.

This is the public name of ``selfsup_kernels.lab.profile``, imported when ``selfsup_kernels.profile`` is first used.
"""

from selfsup_kernels.lab.profile import PARTS, Run, steps

__all__ = ["PARTS", "Run", "steps"]
