"""Statistics of classes: their centres, which are one, and which are two."""
