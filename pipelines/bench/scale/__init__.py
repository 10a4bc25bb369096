"""Whether what must hold at any size does: synthetic data, and a bound for every figure."""
