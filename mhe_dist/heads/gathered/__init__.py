"""Heads whose softmax runs across ranks: every rank sees all samples, scored on its own rows."""
