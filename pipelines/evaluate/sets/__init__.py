"""Readers of evaluation sets: tables of pairs, InsightFace .bin files, IJB-B and IJB-C."""
