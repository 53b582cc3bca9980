"""InfoNCE and SigLIP on GPUs: Triton kernels on tiles of the matrix of scores, and the functions that launch them.

The first call imports this, so that the package works without Triton. With ``TRITON_INTERPRET=1`` set before that, the
same kernels run on CPU tensors in Triton's interpreter, for tests; it is slow, and wrong in bfloat16 without the
corrections of ``tests/gpu/interpreter16.py``.

Kernel arguments have the same names everywhere. What the forward leaves for the backward comes as one tuple, ``saved``
(:class:`selfsup_kernels.info_nce.call.Saved`, which has the shapes), sizes and constants as those of
:mod:`selfsup_kernels.tiles.arguments`. The others, with M stored rows of the views (padding included), S numbers from
one row to the next and C columns of negatives:

======================== ============== ================================================================================
``source_x, source_y``                  the stored rows (M + K, S) as pointers or TMA descriptors; zeros in the padding
``ids``                                 ``SampleIds`` of duplicates, in the backward of labels across views too; or None
``sums``                 (C, M)         float32: sums of exp(score - reference) over the negatives of each column
``upstream``             (M,)           float32: an anchor's gradient relative to the largest; None where all are equal
``grad_scale``           ()             that largest gradient
``partial``              (slots, m, S)  float32: sums of G z over parts of the columns, of the m rows of this process
``loss``                 (V, b)         float32, of the b samples of this process
======================== ============== ================================================================================
"""
