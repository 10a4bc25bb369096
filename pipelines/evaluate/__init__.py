"""Evaluation protocols: which images are embedded, and which embeddings are compared."""
