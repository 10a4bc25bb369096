"""Sweeps: many runs of one config with different settings, on Ray Tune."""
