"""What only a GPU can show, in one command of at most eight minutes."""
