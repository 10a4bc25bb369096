"""Batches of training images, made by loader processes."""
