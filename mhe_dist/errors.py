"""The two kinds of trouble that the command line tells apart."""


class UserError(Exception):
    """A mistake that the user can cure: the message names file, key, value, cure. Exit code 2."""


class RunError(Exception):
    """A failure of the run that no change of the command would have prevented. Exit code 1."""
