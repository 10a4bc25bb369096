"""Studies of many runs, and the page about their results."""
