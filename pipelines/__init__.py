"""Data in, models out: assembles runs from the training library and the data pipeline."""
