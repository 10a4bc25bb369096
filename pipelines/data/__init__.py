"""Samples: their order, their mixture, and the way from the bytes of a tar to an image."""
