"""Ranks: process groups, collectives, starting ranks on one machine, and noticing stuck ones."""
