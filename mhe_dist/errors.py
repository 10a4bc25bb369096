"""The kinds of trouble that the command line tells apart, and words that messages share."""

import signal
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit code that shells give to what Ctrl-C ended: 130."""


class UserError(Exception):
    """A mistake that the user can cure: the message names file, key, value, cure."""

    exit_code = 2


class RunError(Exception):
    """A failure of the run that no change of the command would have prevented."""

    exit_code = 1


class StorageUnavailable(RunError):
    """A disk or a store gave no answer for a while: it says nothing of what is there."""


class Preempted(Exception):
    """The run was told to stop (SIGTERM), saved itself, and goes on when it is started again.

    Attributes:
        exit_code: EX_TEMPFAIL of sysexits.h; what restarts jobs can tell it from a failure.
    """

    exit_code = 75


def is_final(error: BaseException) -> bool:
    """Whether an error would come back if the same was begun again."""
    return isinstance(error, (UserError, RunError)) and not isinstance(error, StorageUnavailable)


def counted(number: int, noun: str) -> str:
    """A number of things: `1 tar`, `1,200 tars`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def list_choices(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is unknown: the one that is most like it, and all that there are."""
    names = list(known)
    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    return f"{hint} {', '.join(names)}"


def first_line(error: BaseException | str) -> str:
    """What an error says first; its kind, where it says nothing (empty: text that says nothing)."""
    return _lines(error)[0]


def last_line(error: BaseException | str) -> str:
    """What an error says last, which is the cause where a traceback stands before; see above."""
    return _lines(error)[-1]


def describe_error(error: BaseException, last: bool = False) -> str:
    """An error in a line: its kind, and what it says first; many texts say little by themselves.

    Args:
        error: to describe.
        last: take what it says last.
    """
    kind, said = type(error).__name__, last_line(error) if last else first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def _lines(error: BaseException | str) -> list[str]:
    kind = "" if isinstance(error, str) else type(error).__name__
    return (str(error).strip() or kind).splitlines() or [""]
