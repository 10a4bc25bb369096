"""The page of an audit: its findings with pictures, to be accepted or rejected."""
