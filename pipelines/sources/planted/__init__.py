"""Faults that are planted into a clean data set, and how many of them an audit finds."""
