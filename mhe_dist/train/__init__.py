"""The training loop and what it needs: batches, schedule, metrics, divergence checks."""
