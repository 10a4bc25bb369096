"""The class centres: where their rows lie, how they are stored, moved and optimized."""
