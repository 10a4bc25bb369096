"""The kinds of trouble that the command line tells apart."""


class UserError(Exception):
    """A mistake that the user can cure: the message names file, key, value, cure. Exit code 2."""


class RunError(Exception):
    """A failure of the run that no change of the command would have prevented. Exit code 1."""


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint to go on from. Exit code 75.

    The code is that of sysexits.h for "try again": schedulers may start the same command again.
    """

    exit_code = 75

    def __init__(self, step: int, checkpoints: str) -> None:
        super().__init__(f"stopped at step {step}; {checkpoints} holds what to go on from")
        self.step = step
        self.checkpoints = checkpoints
