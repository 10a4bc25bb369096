"""What a web server refuses, or does not have, is told as that wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
import s3fs.errors

from launcher import cli
from mhe_dist.errors import RunError, UserError
from mhe_dist.storage_errors import as_os_error
from pipelines.report.sheets.pictures import has_index
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.shards.label_set import LabelSet
from pipelines.sources.image_folder import import_folder
from pipelines.sources.webdataset import index_shards
from pipelines.storage.ranges import locate_file, read_range
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.urls import RangeReader, list_folder, url_exists
from tests.support.servers.stores import serving

REFUSED = {code: f"the server refuses it ({code}): its signature" for code in (401, 403)}
MISSING = dict.fromkeys((404, 410), "there is no such file")


class Refusing(BaseHTTPRequestHandler):
    """Answers to `/403/...` with that status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Refusing)) as url:
        yield url


def said(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("code", "reason"), [*REFUSED.items(), *MISSING.items()])
def test_a_file_is_told_with_the_reason(
    web: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    tar, rec = f"{web}/{code}/a.tar", f"{web}/{code}/train.rec"
    assert said(lambda: RangeReader(tar)).startswith(f"{tar}: cannot be opened: {reason}")
    index = said(lambda: index_shards([tar], str(tmp_path)))
    assert index.startswith(f"{tar}: cannot be opened: {reason}")
    assert cli.run(["data", "recordio", "--rec", rec, "--out", str(tmp_path / "out")]) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert f"{rec}: cannot be opened: {reason}" in shown


@pytest.mark.parametrize(("code", "reason"), REFUSED.items())
def test_what_may_not_be_read_is_not_called_missing(
    web: str, tmp_path: Path, code: int, reason: str
) -> None:
    folder = f"{web}/{code}/set"
    loaders: list[Callable[[], Any]] = [
        lambda: ShardIndex.load(folder),
        lambda: LabelSet.load(folder),
        lambda: index_exists(folder),
        lambda: url_exists(folder),
    ]
    for load in loaders:
        assert f": cannot be read: {reason}" in said(load)
    assert not has_index(folder)  # a page does without its pictures
    with pytest.raises(RunError, match=rf"cannot be read \(.*refuses it \({code}\)"):
        read_range(locate_file(f"{folder}/a.tar"), 0, 10)
    (tmp_path / "a.lst").write_text("0\t3\ta.jpg\n1\t4\tb.jpg\n")
    with pytest.raises(RunError, match=rf"[ab]\.jpg cannot be read .*refuses it \({code}\)"):
        import_folder(folder, str(tmp_path / "out"), str(tmp_path / "a.lst"))


@pytest.mark.parametrize("code", MISSING)
def test_what_is_missing_is_looked_for_in_vain(web: str, code: int) -> None:
    folder = f"{web}/{code}/set"
    assert "no shards here (index.json is missing)" in said(lambda: ShardIndex.load(folder))
    assert not index_exists(folder)
    assert list_folder(folder) == []


def test_the_words_of_a_store_are_kept() -> None:
    answer = {
        "Error": {"Code": "AccessDenied", "Message": "not yours"},
        "ResponseMetadata": {"HTTPStatusCode": 403},
    }
    error = s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(answer, "GetObject"))
    refused = as_os_error(error)
    assert as_os_error(refused) is refused
    assert explain_fault(refused) == explain_fault(error)
    assert str(refused).startswith("the server refuses it (403 not yours): its signature")
    plain = PermissionError("no")
    assert as_os_error(plain) is plain
