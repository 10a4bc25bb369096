"""Faults of labels: which images and classes are doubted, why, and the labels without them."""
