"""Tar shards and their index: what a data set is on a disk or an object store."""
