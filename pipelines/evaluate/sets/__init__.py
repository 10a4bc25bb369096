"""Readers of evaluation sets that others made: image folders, InsightFace .bin files, IJB."""
