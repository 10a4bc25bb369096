"""Verbs that train many runs and compare them."""
