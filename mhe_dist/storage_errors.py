"""What the errors of disks and stores mean, whatever library raised them.

A fault is *transient* if the same request may well succeed a little later: a timeout, a lost
connection, a body that was cut off, an answer of 5xx. It is *permanent* if that is known not to be
so: no such file, no permission, a false certificate. Of many errors neither is known.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from typing import Final

_PERMANENT: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_TRANSIENT: Final = (TimeoutError, asyncio.TimeoutError, ConnectionError)
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_ERRNO: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EIO,  # what mounted stores and NFS say after a time-out; rarely a broken disk
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# Of optional packages (aiohttp, botocore, requests, urllib3, gcsfs), so by name: a class of the
# error's own or one that it inherits from. The first list counts first.
_PERMANENT_NAMES: Final = frozenset({"ClientSSLError", "SSLError", "InvalidURL"})
_TRANSIENT_NAMES: Final = frozenset(
    {
        "ChecksumError",
        "ChunkedEncodingError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ProtocolError",
        "ResponseParserError",
        "Timeout",
    }
)
# Codes in the body of an S3 answer whose status tells something else.
_TRANSIENT_CODES: Final = frozenset({"InternalError", "RequestTimeout", "SlowDown"})

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

ABSENT: Final = (FileNotFoundError, NotADirectoryError)
"""What says that a file or folder is not there; any other error says nothing of it."""


class RefusedError(PermissionError):
    """A server refuses a file; the text says why."""


class TruncatedRead(ConnectionError):
    """Fewer bytes came than the file has there, though the answer looked complete."""


def truncated_read(start: int, stop: int, count: int = 0) -> TruncatedRead:
    """The error of a request for the bytes `[start, stop)` that gave `count` of them."""
    return TruncatedRead(f"{count} of {stop - start} bytes came from byte {start} on")


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


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    return _verdict(error) is True


def is_permanent(error: BaseException) -> bool:
    """Whether the same request is known to fail a little later, too."""
    return _verdict(error) is False


def _verdict(error: BaseException) -> bool | None:
    """Whether an error is transient; None: nobody knows."""
    # The cause knows best: fsspec makes "not found" of a size that a server did not tell.
    verdicts = (_classify(each) for each in reversed(list(error_chain(error))))
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _classify(error: BaseException) -> bool | None:
    """Whether one error of a chain is transient; None if it does not tell."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _PERMANENT_NAMES or isinstance(error, socket.gaierror):
        return getattr(error, "errno", None) == socket.EAI_AGAIN
    if _code(error) in _TRANSIENT_CODES:
        return True
    if (code := http_status(error)) is not None:
        return code in _TRANSIENT_STATUS
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, _TRANSIENT) or names & _TRANSIENT_NAMES:
        return True
    return (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO) or None


def _code(error: BaseException) -> str | None:
    """The code in the body of an S3 answer."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
