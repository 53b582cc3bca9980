"""What the CUDA library (`csrc/cuda`) leaves to Python. The library is loaded by `selfsup_kernels.backends`."""
