"""Multi-Head Sampling by routing: a sample travels to the rank that owns its head."""
