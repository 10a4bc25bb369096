"""`mhe data`."""
