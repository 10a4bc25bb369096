"""Label sets from tables of keys and classes (CSV, Parquet), in bounded memory."""
