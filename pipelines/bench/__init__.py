"""Measurements of `mhe bench`: each part beside a baseline, in the same run."""
