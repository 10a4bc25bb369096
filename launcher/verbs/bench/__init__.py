"""`mhe bench`."""
