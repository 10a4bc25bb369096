"""Where the record of a run goes: JSON lines, MLflow and TensorBoard."""
