"""Paths that the system refuses, in words: what stands in the way, and what to do about it."""

from __future__ import annotations

import errno
import re
from typing import Final

_FAULTS: Final = {
    errno.EACCES: "may not be read or written; change its rights, or give another path",
    errno.EPERM: "may not be read or written; change its rights, or give another path",
    errno.EROFS: "the file system is read-only; give another path",
    errno.ENOTDIR: "a file stands where a folder is needed; give another path, or move it away",
    errno.EEXIST: "a file stands where a folder is needed; give another path, or move it away",
    errno.EISDIR: "a folder stands where a file is needed; give the path of a file",
    errno.ELOOP: "symbolic links lead in a circle; give another path",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
}
_UNFINISHED: Final = re.compile(r"\.([^/]+)\.[0-9a-f]{32}\.tmp$")  # of a file that is being made
_SYSTEM: Final = "/proc/"  # where the system says "no such file" of whatever is to be made


def explain_unreadable(error: Exception) -> str:
    """Why a file that a user named could not be read, without the system's numbers."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    known = _FAULTS.get(error.errno or 0) if isinstance(error, OSError) else None
    return known or str(error) or type(error).__name__


def describe_unusable_path(error: OSError) -> str:
    """What is wrong with the path of an error; empty: the error is no mistake in a path.

    A file that is missing is none of these: only who opens it knows whether the user named it.
    """
    if error.filename is None:
        return ""
    path = _UNFINISHED.sub(r"\1", str(error.filename2 or error.filename))
    if error.errno == errno.ENOENT and path.startswith(_SYSTEM):
        return f"{path}: is not there, and nothing can be made below {_SYSTEM}; give another path"
    return f"{path}: {_FAULTS[error.errno]}" if error.errno in _FAULTS else ""
