"""The verbs of the `mhe` command."""
