"""What a step or a run needs, counted without the machines that would do it."""
