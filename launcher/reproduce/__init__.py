"""Studies: sets of runs that are compared, and the page about their results."""
