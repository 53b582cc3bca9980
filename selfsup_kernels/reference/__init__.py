"""Eager PyTorch: the specification of every op (dense, differentiable by autograd) and its portable implementation."""
