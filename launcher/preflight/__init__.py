"""Whether a run would work, and what it would cost, before it starts."""
