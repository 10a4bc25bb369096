"""`mhe embed`, `mhe search`: images as embeddings."""
