"""Paths that the system refuses, in words: what stands in the way, and what to do about it."""

from __future__ import annotations

import errno
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


def describe_unusable_path(error: OSError) -> str:
    """What is wrong with the path of an error; empty: the error is no mistake in a path.

    A file that is missing is none of these: only who opens it knows whether the user named it.
    """
    if error.filename is None or error.errno not in _FAULTS:
        return ""
    return f"{error.filename2 or error.filename}: {_FAULTS[error.errno]}"
