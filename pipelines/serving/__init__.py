"""Trained backbones for others: models that take images, and cards that describe them."""
