"""Plots and pages about runs, for people to look at."""
