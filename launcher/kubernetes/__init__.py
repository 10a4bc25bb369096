"""Kubernetes: RayJobs, rendered and submitted."""
