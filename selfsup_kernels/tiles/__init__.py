"""InfoNCE on GPUs: Triton kernels on tiles of the matrix of scores, and the Python functions that launch them.

The first call imports this, so that the package works without Triton. With ``TRITON_INTERPRET=1`` set before that, the
same kernels run on CPU tensors in Triton's interpreter, for tests; it is slow, and wrong in bfloat16 without the
corrections of ``tests/gpu/interpreter16.py``.

Kernel arguments have the same names everywhere. With M stored rows of the views (padding included), K of the queue, S
numbers from one row to the next, C columns of negatives and P of positives, as in ``info_nce.call.Saved``:

====================== ============== ==================================================================================
``stored``             (M + K, S)     unit rows (or rows, without ``normalize``) in the dtype of the views; zeros in the
                                      padding. ``source_x``, ``source_y``: these rows as pointers or TMA descriptors
``inverse_norms``      (M + K,)       float32; negative where the norm's floor was taken
``sums``               (C, M)         float32: sums of exp(score - reference) over the negatives of each column
``weights``            (C, M)         float32: weights of negatives relative to the reference
``log_weights``        (C, M)         float32: their logarithms, without the reference
``positives``          (P, M)         float32
``scalars``            (4,)           float32: 1 / temperature, the longest row, whether a weight is out of range
``order``              (B,)           int64: the samples sorted by label; None without labels
``classes``, ``ends``  (M,)           int32: the first row of each row's class, and the row after its last
``upstream``           (M,)           float32: each anchor's gradient relative to the largest; None where all are equal
``grad_scale``         ()             that largest gradient
``partial``            (slots, m, S)  float32: sums of G z over parts of the columns, of the m rows of this process
``loss``               (V, b)         float32, of the b samples of this process
``rows``, ``PADDED``   numbers        M, and the stored rows of one view
``BATCH``, ``QUEUE``   numbers        rows of one view (with labels of all), and K, both without padding
``VIEWS``, ``CORE``    numbers        V (1 with labels), and the core view, negative for none
====================== ============== ==================================================================================
"""
