"""Readers that turn other formats into WebDataset shards."""
