"""Where the time and the memory of training steps go: :func:`steps`, and ``python -m selfsup_kernels profile``.

The public name of ``selfsup_kernels.lab.profile``, imported when ``selfsup_kernels.profile`` is first used.
"""

from selfsup_kernels.lab.profile import PARTS, Run, steps

__all__ = ["PARTS", "Run", "steps"]
