"""Paths and URLs that are refused, in words: what stands in the way, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from typing import Final

from mhe_dist.storage_errors import as_os_error

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


def require_usable(path: str, is_folder: bool) -> None:
    """Raise what the system would raise if this file or folder of this machine were written now.

    Nothing is made. A URL, and an empty path, are not looked at.

    Args:
        path: of what is to be written; it may exist.
        is_folder: whether it is a folder.

    Raises:
        OSError: as `describe_unusable_path` describes it.
    """
    if not path or "://" in path:
        return
    there = path
    while not _is_there(there):
        there = os.path.dirname(there.rstrip("/")) or os.curdir
    if path.startswith(_SYSTEM) and there != path:
        raise _error(errno.ENOENT, path)
    if os.path.isdir(there):
        if there == path and not is_folder:
            raise _error(errno.EISDIR, path)
    elif there != path or is_folder:
        raise _error(errno.ENOTDIR, there)
    if not os.access(there, os.W_OK):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        raise _error(errno.EROFS if read_only else errno.EACCES, there)


def _is_there(path: str) -> bool:
    """Whether something has that path; raises what is wrong with the path itself."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # what is in the way is found further up
        return False
    return True


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def explain_fault(error: Exception) -> str:
    """Why a path that a user named could not be read or written, without the system's numbers."""
    error = as_os_error(error)
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
