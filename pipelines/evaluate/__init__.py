"""Evaluation protocols on embeddings."""
