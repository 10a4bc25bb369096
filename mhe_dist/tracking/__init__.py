"""Where the record of a run goes: JSON lines and MLflow."""
