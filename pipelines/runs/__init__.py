"""Runs on disk: their folders, their trained models, and what a new run takes over from one."""
