"""Triton kernels that take the place of eager passages on CUDA tensors, and when they do."""
