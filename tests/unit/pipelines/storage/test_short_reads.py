"""A store that gives less than the file has there is asked again; no damage gets through."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.spec import AbstractBufferedFile
from werkzeug.wrappers import Request, Response

from mhe_dist.errors import RunError
from pipelines.audit import findings
from pipelines.audit.findings import DECISION, IDENTITY
from pipelines.data.mixture import class_list
from pipelines.sources.label_table.rows import TableLayout, read_rows
from pipelines.storage.buffered_file import open_buffered
from pipelines.storage.urls import RangeReader, open_stream
from tests.support.servers.stores import Counted, served

CONTENT = bytes(range(256)) * 40
pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.bin"
    path.write_bytes(CONTENT)
    return path


def short(*lengths: int) -> Callable[[str, int, int], bytes]:
    """A store that cuts each of its first answers to a length."""
    left = list(lengths)

    def content(path: str, start: int, stop: int) -> bytes:
        data = Path(path).read_bytes()[start:stop]
        return data[: left.pop(0)] if left else data

    return content


def always_short(path: str, start: int, stop: int) -> bytes:
    return Path(path).read_bytes()[start : min(stop, 700)]


def test_a_part_that_came_short_is_completed(file: Path) -> None:
    Counted.begin(short(10, 0, 3))
    with RangeReader(f"counted://{file}") as reader:
        assert reader.read(100, 900) == CONTENT[100:900]


def test_of_many_parts_those_that_came_short_are_asked_for_again(file: Path) -> None:
    Counted.begin(short(500, 12, 0))
    starts, stops = [0, 100, 5000, 10200, 11000], [500, 200, 6000, 10300, 11100]
    with RangeReader(f"counted://{file}") as reader:
        parts = reader.read_many(starts, stops)
    assert parts == [CONTENT[start:stop] for start, stop in zip(starts, stops, strict=True)]
    # 500, 12 and 0 bytes, the end of the file, and then the two that had come short.
    assert Counted.bytes.value == 500 + 12 + 0 + 40 + (100 + 1000)


@pytest.mark.parametrize("many", [False, True])
def test_a_part_that_stays_short_is_an_error_that_says_which(file: Path, many: bool) -> None:
    Counted.begin(always_short)
    words = f"counted://{file}: 6 attempts failed, the last with TruncatedRead: "
    with RangeReader(f"counted://{file}") as reader:
        if many:
            words += "100 of 300 bytes came from byte 600 on"
            with pytest.raises(RunError, match=re.escape(words)):
                reader.read_many([0, 600], [10, 900])
        else:
            words += "0 of 200 bytes came from byte 700 on"
            with pytest.raises(RunError, match=re.escape(words)):
                reader.read(600, 900)


def test_a_server_that_gives_half_a_part_is_asked_again(file: Path) -> None:
    requests = []

    @Request.application
    def app(request: Request) -> Response:
        requests.append(request.headers.get("Range"))
        ranges = request.range
        start, stop = ranges.ranges[0] if ranges else (0, len(CONTENT))
        data = CONTENT[start:stop]
        if request.method == "GET" and len(requests) % 2 == 0:
            data = data[: len(data) // 2]
        headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{len(CONTENT)}"}
        return Response(data, 206 if ranges else 200, {"Accept-Ranges": "bytes"} | headers)

    with served(app) as url, RangeReader(f"{url}/rows.bin") as reader:
        for start in range(0, len(CONTENT), 1000):
            stop = min(start + 1000, len(CONTENT))
            assert reader.read(start, stop) == CONTENT[start:stop]
            assert reader.read_many([start, 0], [stop, 7]) == [CONTENT[start:stop], CONTENT[:7]]


def test_a_local_file_is_read_whole_though_the_system_reads_pieces(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: whole(fd, min(size, 77), at))
    with RangeReader(str(file)) as reader:
        assert reader.read(5, 5000) == CONTENT[5:5000]


def test_a_local_file_that_became_shorter_is_an_error(file: Path) -> None:
    with RangeReader(str(file)) as reader:
        os.truncate(file, 600)
        with pytest.raises(RunError, match=r"rows\.bin: .* 0 of 300 bytes came from byte 600 on"):
            reader.read(500, 900)


def read_all(url: str) -> bytes:
    with open_stream(url) as stream:
        pieces = []
        while piece := stream.read(1000):
            assert len(piece) == 1000 or sum(map(len, pieces)) + len(piece) == len(CONTENT)
            pieces.append(piece)
    return b"".join(pieces)


def test_a_stream_gives_what_was_asked_for(file: Path) -> None:
    for lengths in ((10, 0, 3), (0, 0, 999), (1000, 0)):
        Counted.begin(short(*lengths))
        assert read_all(f"counted://{file}") == CONTENT


def test_a_stream_that_ends_too_early_is_an_error(file: Path) -> None:
    Counted.begin(always_short)
    words = r"6 attempts failed, the last with TruncatedRead: 0 of 300 bytes came from byte 700 on"
    with pytest.raises(RunError, match=words):
        read_all(f"counted://{file}")


def test_a_server_that_tells_no_size_is_read_to_its_end(file: Path) -> None:
    @Request.application
    def app(request: Request) -> Response:
        pieces = (CONTENT[start : start + 300] for start in range(0, len(CONTENT), 300))
        return Response(pieces)

    with served(app) as url:
        assert read_all(f"{url}/rows.bin") == CONTENT


def test_lines_are_not_cut_where_an_answer_was(file: Path) -> None:
    lines = [b"%d\n" % number for number in range(3000)]
    file.write_bytes(b"".join(lines))
    Counted.begin(short(1001, 0, 17))
    with open_buffered(f"counted://{file}") as stream:
        assert list(stream) == lines


@pytest.fixture
def empty_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose second and third answers are empty; it is asked for small blocks."""
    monkeypatch.setattr(AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", 1000)
    Counted.begin(short(10**9, 0, 0))


@pytest.mark.usefixtures("empty_answers")
def test_no_class_of_a_list_is_lost(file: Path) -> None:
    file.write_text("class\n" + "".join(f"{number}\n" for number in range(20_000)))
    rows = list(class_list._rows(f"counted://{file}"))
    assert rows == [["class"], *([str(number)] for number in range(20_000))]


@pytest.mark.usefixtures("empty_answers")
def test_no_row_of_a_table_is_lost(file: Path) -> None:
    table = file.with_suffix(".csv")
    table.write_text("key,class\n" + "".join(f"{n:08d},{n}\n" for n in range(20_000)))
    found = [
        name for rows in read_rows([f"counted://{table}"], TableLayout()) for name in rows.samples
    ]
    assert len(found) == 20_000


@pytest.mark.usefixtures("empty_answers")
def test_no_decision_is_lost(file: Path) -> None:
    file.write_text(",".join((*IDENTITY, DECISION)) + "\n" + "a,1,2,3,4,,\n" * 20_000)
    assert len(list(findings._decision_rows(f"counted://{file}"))) == 20_000
