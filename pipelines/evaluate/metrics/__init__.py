"""Figures from embeddings alone: ROC, verification, identification, bootstrap intervals."""
