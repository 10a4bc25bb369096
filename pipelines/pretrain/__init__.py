"""A pretraining run on one rank, from the config to the exported backbone."""
