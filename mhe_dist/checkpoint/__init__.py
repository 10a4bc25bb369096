"""Checkpoints of named global tensors: written by all ranks, read on any number of ranks."""
