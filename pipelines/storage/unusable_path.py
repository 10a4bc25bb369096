"""Paths and URLs that are refused, in words: what stands in the way, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
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
# Of optional packages (botocore, google-auth), so by name.
_NO_CREDENTIALS: Final = frozenset(
    {
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
    }
)
_REFUSED: Final = frozenset({401, 403})
_GONE: Final = frozenset({404, 410})
_UNFINISHED: Final = re.compile(r"\.([^/]+)\.[0-9a-f]{32}\.tmp$")  # of a file that is being made
_SYSTEM: Final = "/proc/"  # where the system says "no such file" of whatever is to be made


class RefusedError(PermissionError):
    """A server refuses a file; the text says why."""


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


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, one after the other."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        yield each
        each = each.__cause__


def http_status(error: BaseException) -> int | None:
    """The HTTP status that made aiohttp, botocore, requests or gcsfs raise an error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        # Errors of aiohttp's parser have a `code`, too, but no server sent it.
        found = getattr(error, "code" if type(error).__name__ == "HttpError" else "status", None)
    return int(found) if str(found).isdecimal() else None


def as_os_error(error: Exception) -> Exception:
    """What the system would have raised, of an error whose server refused a file or has none.

    Libraries of stores have errors of their own for it, and fsspec says of whatever a web server
    refuses that it does not exist.
    """
    code = next((code for each in error_chain(error) if (code := http_status(each))), None)
    if code in _GONE and not isinstance(error, FileNotFoundError):
        return FileNotFoundError(str(error))
    if code not in _REFUSED or isinstance(error, RefusedError):
        return error
    said = f" {error}" if isinstance(error, PermissionError) and str(error) else ""
    return RefusedError(
        f"the server refuses it ({code}{said}): its signature or token has expired, or you have no "
        "right to it"
    )


def explain_fault(error: Exception) -> str:
    """Why a path that a user named could not be read or written, without the system's numbers."""
    error = as_os_error(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    known = _FAULTS.get(error.errno or 0) if isinstance(error, OSError) else None
    return known or str(error) or type(error).__name__


def describe_missing_credentials(error: BaseException, url: str = "") -> str:
    """What a store wants, of an error of its library; empty: the error is another one.

    Args:
        error: that a request raised.
        url: of the request, where it is known.
    """
    if type(error).__name__ not in _NO_CREDENTIALS:
        return ""
    return (
        f"{url or 'a store'}: there are no credentials for it ({error}); give them as its own "
        "tools want them (s3://: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
        "gs://: GOOGLE_APPLICATION_CREDENTIALS)"
    )


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
