"""Heads of several levels: Multi-Head Product and Multi-Head Cascade."""
