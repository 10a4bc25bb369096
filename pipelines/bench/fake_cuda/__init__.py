"""A CUDA device that computes nothing: what a step does on a GPU, known without one."""
