"""Plots and pages about runs, evaluations and data sets."""
