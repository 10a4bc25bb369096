"""Where the tasks of long work run."""
