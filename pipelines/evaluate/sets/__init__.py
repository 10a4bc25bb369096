"""Readers of evaluation sets: image folders, InsightFace .bin files, IJB-B and IJB-C."""
