"""What is asked again, how often, and what is not."""

from __future__ import annotations

import asyncio
import errno
import http.client
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec.exceptions
import gcsfs.retry
import pytest
import s3fs.errors
from aiohttp import http_exceptions

from mhe_dist.errors import RunError, UserError
from mhe_dist.storage_errors import is_transient
from mhe_dist.storage_retry import errors_naming, with_retries
from pipelines.storage.ranges import locate_file, read_range
from tests.support.servers.stores import Counted, Faulty, files, served


def from_s3(code: str, status: int) -> Exception:
    """What s3fs makes of an answer."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(answer, "GetObject"))


def from_http(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSIENT = [
    TimeoutError(),
    asyncio.TimeoutError(),
    fsspec.exceptions.FSTimeoutError(),
    ConnectionResetError(),
    http.client.IncompleteRead(b""),
    OSError(errno.ECONNREFUSED, ""),
    OSError(errno.EHOSTUNREACH, ""),
    socket.gaierror(socket.EAI_AGAIN, ""),
    *map(from_http, (408, 429, 500, 502, 503, 504)),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientOSError(errno.ECONNRESET, ""),
    caused(aiohttp.ClientPayloadError(), http_exceptions.ContentLengthError("cut off")),
    from_s3("SlowDown", 503),
    from_s3("503", 503),
    from_s3("InternalError", 200),
    from_s3("RequestTimeout", 400),
    botocore.exceptions.ReadTimeoutError(endpoint_url="x"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="x"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    gcsfs.retry.HttpError({"code": 503, "message": ""}),
    gcsfs.retry.ChecksumError(),
    caused(FileNotFoundError(), from_http(503)),
]
PERMANENT = [
    FileNotFoundError(),
    PermissionError(),
    ValueError(),
    KeyError("x"),
    OSError(errno.ENOSPC, ""),
    socket.gaierror(socket.EAI_NONAME, ""),
    *map(from_http, (400, 401, 403, 404, 501)),
    from_s3("NoSuchKey", 404),
    from_s3("NoSuchBucket", 404),
    from_s3("AccessDenied", 403),
    from_s3("InvalidAccessKeyId", 403),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.SSLError(endpoint_url="x", error="certificate"),
    gcsfs.retry.HttpError({"code": 403, "message": ""}),
    caused(FileNotFoundError(), from_http(404)),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_asked_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_what_will_not_pass_is_not(error: Exception) -> None:
    assert not is_transient(error)


class Call:
    """Fails with each of some errors, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "result"


def test_the_waits_double_up_to_half_a_minute(waits: list[float]) -> None:
    assert with_retries(Call(*[TimeoutError() for _ in range(9)]), "u", 9) == "result"
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(
        longest_wait / 2 <= wait <= longest_wait
        for wait, longest_wait in zip(waits, longest, strict=True)
    )
    assert (
        len({wait / longest_wait for wait, longest_wait in zip(waits, longest, strict=True)}) == 9
    )


def test_giving_up_names_everything(waits: list[float]) -> None:
    call = Call(*[ConnectionResetError(f"number {n}") for n in range(9)])
    words = "s3://b/x: 4 attempts failed, the last with ConnectionResetError: number 3"
    with pytest.raises(RunError, match=words):
        with_retries(call, "s3://b/x", 3)
    assert (call.calls, len(waits)) == (4, 3)


def test_a_permanent_fault_is_raised_at_once(waits: list[float]) -> None:
    call = Call(TimeoutError(), PermissionError("no"))
    with pytest.raises(PermissionError):
        with_retries(call, "u")
    assert (call.calls, len(waits)) == (2, 1)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(256)) * 4)
    return path


def spoiled(*answers: Callable[[bytes], Any]) -> Callable[[str, int, int], bytes]:
    """A store that does something to each of its first answers."""
    left = list(answers)

    def content(path: str, start: int, stop: int) -> bytes:
        data = Path(path).read_bytes()[start:stop]
        return left.pop(0)(data) if left else data

    return content


def test_a_short_answer_is_asked_for_again(tar: Path, waits: list[float]) -> None:
    Counted.begin(spoiled(lambda data: data[:100], lambda data: b""))
    assert read_range(locate_file(f"counted://{tar}"), 10, 300) == tar.read_bytes()[10:300]
    assert len(waits) == 2


def test_the_end_of_a_file_is_no_fault(tar: Path, waits: list[float]) -> None:
    Counted.begin()
    for url in (f"counted://{tar}", str(tar)):
        assert read_range(locate_file(url), 1000, 2000) == tar.read_bytes()[1000:]
        assert read_range(locate_file(url), 3000, 4000) == b""
        assert read_range(locate_file(url), 7, 7) == b""
    with served(files(tar.parent)) as url:
        assert read_range(locate_file(f"{url}/a.tar"), 1000, 2000) == tar.read_bytes()[1000:]
        assert read_range(locate_file(f"{url}/a.tar"), 3000, 4000) == b""
    assert waits == []


def test_a_server_that_always_fails_is_left(tar: Path, waits: list[float]) -> None:
    app = Faulty(files(tar.parent), share=1)
    with served(app) as url, pytest.raises(RunError, match=r"a\.tar: 3 attempts"):
        read_range(locate_file(f"{url}/a.tar"), 0, 10, retries=2)
    assert app.requests == 3


def test_a_missing_file_fails_at_once(tar: Path, waits: list[float]) -> None:
    app = Faulty(files(tar.parent), share=0)
    with served(app) as url, pytest.raises(RunError, match=r"b\.tar: cannot be read .FileNotFound"):
        read_range(locate_file(f"{url}/b.tar"), 0, 10)
    assert (app.requests, waits) == (1, [])


@pytest.mark.parametrize("length", [200, 1024])
def test_whole_files_are_not_taken_for_parts(tar: Path, length: int) -> None:
    tar.write_bytes(tar.read_bytes()[:length])
    Counted.begin(lambda path, start, stop: Path(path).read_bytes())
    with pytest.raises(RunError, match="whole files only"):
        read_range(locate_file(f"counted://{tar}"), 150, 500)


def test_waiting_is_told_to_those_who_listen(
    waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        with_retries(Call(TimeoutError("slow")), "s3://b/x")
    assert "s3://b/x: attempt 1 failed with TimeoutError: slow" in caplog.text


def test_missing_credentials_are_told_with_their_cure() -> None:
    def refuse() -> None:
        raise botocore.exceptions.NoCredentialsError

    cure = pytest.raises(UserError, match=r"s3://b/x: there are no credentials.*AWS_PROFILE")
    with cure:
        with_retries(refuse, "s3://b/x")
    with cure, errors_naming("s3://b/x"):
        refuse()
