"""`mhe evaluate`."""
