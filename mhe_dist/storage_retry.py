"""Repeats a request to a store, or to a disk, that failed for the moment.

Which faults those are, `mhe_dist.storage_errors` knows. Retries inside a store's own library count
as one attempt here.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import has_magic
from typing import Any, Final, TypeVar

from fsspec.implementations.local import LocalFileSystem

from mhe_dist.errors import (
    Preempted,
    RunError,
    StorageUnavailable,
    UserError,
    describe_error,
)
from mhe_dist.storage_errors import (
    ABSENT,
    as_os_error,
    describe_missing_credentials,
    is_permanent,
    is_transient,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRIES: Final = 5
FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S: Final = 30.0

# Its own, so that nobody else's draws change.
_jitter = random.Random()


def with_retries(call: Callable[[], T], url: str, retries: int = RETRIES) -> T:
    """The result of a call, made again after transient faults.

    Waits half a second at first and twice as long each time, up to half a minute; shortened at
    random by up to a half, so that many processes do not come back at the same moment.

    Args:
        call: what to do.
        url: what it is about, for messages.
        retries: how many attempts may follow the first one.

    Raises:
        StorageUnavailable: a transient fault each time; names the attempts and the last fault.
        UserError: the store wants credentials that it does not find.
        OSError: a server refuses the file, or has none; see `as_os_error`.
        Exception: any other fault, as the store raised it.
    """
    return _repeat(call, url, retries, is_transient)


def until_answered(call: Callable[[], T], url: str) -> T:
    """The result of a call about files of a run, for whom no answer must not count as an answer.

    Repeats it as `with_retries` does, and after faults of which nobody knows whether they pass.

    Raises:
        FileNotFoundError, NotADirectoryError: the store said that there is no such file.
        StorageUnavailable: it did not answer, or refused to.
        UserError: it wants credentials that it does not find.
    """
    try:
        return _repeat(call, url, RETRIES, lambda error: not is_permanent(error))
    except (*ABSENT, RunError, UserError, Preempted):
        raise
    except Exception as error:  # stores raise what they like
        raise StorageUnavailable(f"{url}: cannot be read now ({describe_error(error)})") from error


def path_exists(filesystem: Any, path: str) -> bool:
    """Whether a store has a file or folder; to fsspec's `exists` what gives no answer is not there.

    Raises:
        StorageUnavailable, UserError: see `until_answered`.
    """
    try:
        until_answered(lambda: filesystem.info(path), filesystem.unstrip_protocol(path))
    except ABSENT:
        return False
    return True


def remove_if_exists(filesystem: Any, path: str) -> None:
    """Delete a file, or a folder with all that is in it; that there is none is no fault.

    To fsspec's `rm`, a path in a store with `[`, `*` or `?` is a pattern: it would delete what
    that matches.

    Raises:
        StorageUnavailable, UserError, OSError: see `with_retries`.
    """

    def remove() -> None:
        """One attempt; the answer to the one before may have been lost."""
        filesystem.invalidate_cache()
        if not path_exists(filesystem, path):
            return
        if isinstance(filesystem, LocalFileSystem) or not has_magic(path):
            filesystem.rm(path, recursive=True)
            return
        for file in filesystem.find(path):
            filesystem.rm_file(file)

    with_retries(remove, filesystem.unstrip_protocol(path))


def _repeat(
    call: Callable[[], T], url: str, retries: int, may_pass: Callable[[Exception], bool]
) -> T:
    """See `with_retries`.

    Args:
        may_pass: whether a fault is worth another attempt.
    """
    wait, attempt = FIRST_WAIT_S, 0
    while True:
        attempt += 1
        try:
            return call()
        except (RunError, UserError, Preempted):
            raise
        except Exception as error:  # stores raise what they like
            _refuse_missing_credentials(error, url)
            if not may_pass(error):
                if (known := as_os_error(error)) is error:
                    raise
                raise known from error
            if attempt > retries:
                raise StorageUnavailable(
                    f"{url}: {attempt} attempts failed, the last with {describe_error(error)}"
                ) from error
            log.info("%s: attempt %d failed with %s", url, attempt, describe_error(error))
        time.sleep(wait * _jitter.uniform(0.5, 1))
        wait = min(2 * wait, _LONGEST_WAIT_S)


@contextmanager
def errors_naming(url: str, failure: str = "cannot be read", cure: str = "") -> Iterator[None]:
    """Turn whatever a store raises into a RunError that names the URL.

    Args:
        url: what the block is about.
        failure: what happens to it, in words.
        cure: ends the message.

    Raises:
        StorageUnavailable: of what may pass; any other RunError of the rest.
        UserError: instead, where the store wants credentials that it does not find.
    """
    try:
        yield
    except (RunError, UserError, Preempted):
        raise
    except Exception as error:  # stores raise what they like
        _refuse_missing_credentials(error, url)
        known = describe_error(as_os_error(error))
        kind = StorageUnavailable if is_transient(error) else RunError
        raise kind(f"{url}: {failure} ({known}){cure}") from error


def _refuse_missing_credentials(error: Exception, url: str) -> None:
    if lack := describe_missing_credentials(error, url):
        raise UserError(lack) from error
