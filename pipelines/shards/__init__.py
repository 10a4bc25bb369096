"""Tar shards, their index and label sets: what a data set is on a disk or an object store."""
