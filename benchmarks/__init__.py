"""Measurements side by side, each a `mhe bench` verb: ratios of one run, never timed tests."""
