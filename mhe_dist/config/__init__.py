"""The YAML of a run: its models, how it is loaded, and how its mistakes are explained."""
