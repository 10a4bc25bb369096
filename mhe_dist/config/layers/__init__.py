"""The layers of a configuration, from a file or from Python, and how one lies on another."""
