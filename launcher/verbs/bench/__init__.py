"""`mhe bench`: measurements of parts of the system beside their baselines."""
