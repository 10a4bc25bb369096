"""What `mhe bench` measures: ratios against a baseline in the same run."""
