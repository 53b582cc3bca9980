"""``python -m selfsup_kernels bench``: times, memory and errors beside what people use today."""
