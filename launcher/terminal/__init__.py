"""What a person sees: console, progress, logged events, replay and summary."""
