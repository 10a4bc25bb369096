"""Statistics of images: how near classes are, strays, and copies."""
