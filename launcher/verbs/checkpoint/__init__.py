"""`mhe checkpoint`."""
