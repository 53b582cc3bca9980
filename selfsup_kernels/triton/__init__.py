"""Triton kernels for NVIDIA GPUs, and the launchers below them: the ops' implementations ``*.triton``.

Nothing here is imported before the first call of such an op, so that the package works where Triton is not installed.
With ``TRITON_INTERPRET=1`` set before that, the same kernels run on CPU tensors in Triton's interpreter, for tests:
slowly, and in bfloat16 wrongly, unless ``tests/gpu/interpreter16.py`` mends that.
"""
