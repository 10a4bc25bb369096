"""Repeats a request to a store after a transient fault.

A fault is *transient* if the same request may well succeed a little later: a timeout, a lost
connection, a body that was cut off, an answer of 5xx. Any other fault (no such file, no
permission, a false certificate) fails at once. Retries inside a store's own library count as one
attempt here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from mhe_dist.errors import RunError, UserError, describe_error
from pipelines.storage.unusable_path import (
    as_os_error,
    describe_missing_credentials,
    error_chain,
    http_status,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRIES: Final = 5
FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S: Final = 30.0

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
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.EREMOTEIO,
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

# Its own, so that nobody else's draws change.
_jitter = random.Random()


class TruncatedRead(ConnectionError):
    """Fewer bytes came than the file has there, though the answer looked complete."""


def truncated_read(start: int, stop: int, count: int = 0) -> TruncatedRead:
    """The error of a request for the bytes `[start, stop)` that gave `count` of them."""
    return TruncatedRead(f"{count} of {stop - start} bytes came from byte {start} on")


def with_retries(call: Callable[[], T], url: str, retries: int = RETRIES) -> T:
    """The result of a call, made again after transient faults.

    Waits half a second at first and twice as long each time, up to half a minute; shortened at
    random by up to a half, so that many processes do not come back at the same moment.

    Args:
        call: what to do.
        url: what it is about, for messages.
        retries: how many attempts may follow the first one.

    Raises:
        RunError: a transient fault each time; names the attempts and the last fault.
        UserError: the store wants credentials that it does not find.
        OSError: a server refuses the file, or has none; see `as_os_error`.
        Exception: any other fault, as the store raised it.
    """
    wait, attempt = FIRST_WAIT_S, 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:  # stores raise what they like
            if not is_transient(error):
                _refuse_missing_credentials(error, url)
                if (known := as_os_error(error)) is error:
                    raise
                raise known from error
            if attempt > retries:
                raise RunError(
                    f"{url}: cannot be read: {attempt} attempts failed, the last with "
                    f"{describe_error(error)}"
                ) from error
            log.info("%s: attempt %d failed with %s", url, attempt, describe_error(error))
        time.sleep(wait * _jitter.uniform(0.5, 1))
        wait = min(2 * wait, _LONGEST_WAIT_S)


@contextmanager
def errors_naming(url: str) -> Iterator[None]:
    """Turn whatever a store raises into a RunError that names the URL.

    Raises:
        UserError: instead, where the store wants credentials that it does not find.
    """
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:  # stores raise what they like
        _refuse_missing_credentials(error, url)
        known = describe_error(as_os_error(error))
        raise RunError(f"{url}: cannot be read ({known})") from error


def _refuse_missing_credentials(error: Exception, url: str) -> None:
    if lack := describe_missing_credentials(error, url):
        raise UserError(lack) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    # The cause knows best: fsspec makes "not found" of a size that a server did not tell.
    verdicts = (_classify(each) for each in reversed(list(error_chain(error))))
    return next((verdict for verdict in verdicts if verdict is not None), False)


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
