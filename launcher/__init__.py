"""What a person types, and Ray: the `mhe` command, job submission, Ray Train workers."""
