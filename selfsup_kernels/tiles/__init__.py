"""InfoNCE on GPUs: Triton kernels on tiles of the matrix of scores, and the launchers below them.

The first call imports this, so that the package works where Triton is not installed. With ``TRITON_INTERPRET=1`` set
before that, the same kernels run on CPU tensors in Triton's interpreter, for tests: slowly, and in bfloat16 wrongly
without the corrections of ``tests/gpu/interpreter16.py``.
"""
