"""``python -m selfsup_kernels bench``: times, memory and errors against what people use today."""
