"""RecordIO: what was written is read byte for byte; what is damaged is counted, never guessed."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.sources.recordio import (
    MAGIC,
    BadRecordError,
    BytesInMemory,
    Frame,
    class_of_labels,
    join_parts,
    read_frame,
    read_indexed_frames,
    read_payload_head,
    read_record_index,
    scan_frames,
    unpack_record,
)
from tests.support.data.recordio_files import RecordWriter, items, layout, pack_record, part

WORDS = st.lists(st.sampled_from([MAGIC, b"word", b"x", MAGIC[:2], b"\0\0\0\0"]), max_size=12)


def payloads(rec: bytes) -> list[bytes]:
    found = list(scan_frames(BytesInMemory(rec)))
    assert all(isinstance(frame, Frame) for frame in found)
    return [join_parts(rec[frame.start : frame.stop], frame) for frame in found]


def written(*contents: bytes) -> bytes:
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    offsets = [writer.write(key, content) for key, content in enumerate(contents)]
    assert [frame.start for frame in scan_frames(BytesInMemory(stream.getvalue()))] == offsets
    return stream.getvalue()


def test_the_bytes_are_those_of_the_format() -> None:
    assert written(b"whole") == part(0, b"whole")
    assert written(b"abcd" + MAGIC + b"e") == part(1, b"abcd") + part(3, b"e")
    assert written(MAGIC + MAGIC + b"abcd" + MAGIC) == (
        part(1, b"") + part(2, b"") + part(2, b"abcd") + part(3, b"")
    )
    assert written(b"x" + MAGIC) == part(0, b"x" + MAGIC)


@given(st.lists(WORDS.map(b"".join), min_size=1, max_size=4))
def test_payloads_round_trip(contents: list[bytes]) -> None:
    assert payloads(written(*contents)) == contents


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), WORDS.map(b"".join))
def test_labels_and_image_round_trip(labels: list[float], image: bytes) -> None:
    payload = pack_record(labels, image, key=7)
    assert unpack_record(payload) == (labels, image)
    rec = written(payload, b"another record")
    head, size = read_payload_head(BytesInMemory(rec), read_frame(BytesInMemory(rec), 0))
    assert (head.labels, size) == (labels, len(image))


def test_the_header_is_that_of_the_format() -> None:
    assert pack_record([3.0], b"jpg", 5) == struct.pack("<IfQQ", 0, 3.0, 5, 0) + b"jpg"
    assert pack_record([1.0, 2.0], b"", 6) == struct.pack("<IfQQff", 2, 0.0, 6, 0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "too short for an image"),
        (bytes(23), "too short for an image"),
        (struct.pack("<IfQQ", 3, 0, 0, 0) + bytes(8), "32 bytes announces 36"),
        (struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0), "announces"),
    ],
)
def test_a_short_payload_is_damage(payload: bytes, words: str) -> None:
    with pytest.raises(BadRecordError, match=words):
        unpack_record(payload)
    rec = written(payload)
    with pytest.raises(BadRecordError, match=words):
        read_payload_head(BytesInMemory(rec), read_frame(BytesInMemory(rec), 0))


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 1e30])
def test_a_label_that_is_no_class_is_damage(label: float) -> None:
    with pytest.raises(BadRecordError, match="is no class"):
        class_of_labels([label])


def test_the_class_is_the_first_label() -> None:
    assert class_of_labels([16777215.0, 0.5]) == 16777215
    with pytest.raises(BadRecordError):
        class_of_labels([])


@pytest.mark.parametrize(
    ("rec", "words"),
    [
        (b"none at all.", "no record begins at byte 0"),
        (part(0, b"abcd")[:-2], "ends inside it"),
        (part(2, b"abcd"), "flag 2"),
        (part(1, b"abcd") + part(0, b"e"), "flag 0"),
        (part(1, b"abcd"), "no record begins at byte 12"),
        (part(0, b"abcd") + b"garbage!", "no record begins at byte 12"),
        (part(0, b"abcd") + part(3, b"e"), "no other record begins where it ends"),
    ],
)
def test_what_is_no_record_says_why(rec: bytes, words: str) -> None:
    with pytest.raises(BadRecordError, match=words):
        read_frame(BytesInMemory(rec), 0)


def test_a_length_that_swallows_other_records_is_noticed() -> None:
    rec = bytearray(written(b"abcd", b"efgh", b"ijkl"))
    rec[4] = 4 + 12  # now the first one ends where the second one does
    (first, _) = scan_frames(BytesInMemory(bytes(rec)))
    assert isinstance(first, Frame)
    with pytest.raises(BadRecordError, match="other records begin inside it"):
        join_parts(bytes(rec[first.start : first.stop]), first)
    with pytest.raises(BadRecordError, match="reaches into the next"):
        read_frame(BytesInMemory(bytes(rec)), 0, following=12)


def survivors(original: bytes, damaged: bytes, index: bytes | None) -> int:
    """Whatever is still found begins where a record did, and has its label."""
    records = {
        frame.start: frame
        for frame in scan_frames(BytesInMemory(original))
        if isinstance(frame, Frame)
    }
    if index is None:
        found = list(scan_frames(BytesInMemory(damaged)))
    else:
        numbers = [int(line.split()[1]) for line in index.splitlines()]
        found = list(read_indexed_frames(BytesInMemory(damaged), sorted_array(numbers)))
        assert len(found) == len(numbers)
    kept = 0
    for frame in found:
        if not isinstance(frame, Frame):
            continue
        try:
            labels = read_payload_head(BytesInMemory(damaged), frame)[0].labels
            join_parts(damaged[frame.start : frame.stop], frame)
        except BadRecordError:
            continue
        kept += 1
        before = read_payload_head(BytesInMemory(original), records[frame.start])[0].labels
        head = slice(frame.start + 8, frame.start + 8 + 24 + 4 * max(len(labels), len(before)))
        assert labels == before or damaged[head] != original[head]
    return kept


def sorted_array(numbers: list[int]) -> np.ndarray:
    return np.array(sorted(numbers), np.int64)


REC, IDX = layout(items(), "classic")


@given(
    st.lists(st.tuples(st.integers(0, len(REC) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(REC)),
    st.booleans(),
)
def test_damaged_records_are_counted(
    changes: list[tuple[int, int]], length: int, with_index: bool
) -> None:
    rec = bytearray(REC)
    for position, value in changes:
        rec[position] = value
    kept = survivors(REC, bytes(rec[: length or None]), IDX if with_index else None)
    if bytes(rec) == REC and not length:
        assert kept == len(IDX.splitlines())


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end(data: bytes) -> None:
    for frame in scan_frames(BytesInMemory(data + REC[:300] + data)):
        if isinstance(frame, Frame):
            assert 0 <= frame.start < frame.stop <= len(data) * 2 + 300


def test_one_damaged_record_costs_no_other() -> None:
    starts = [frame.start for frame in scan_frames(BytesInMemory(REC)) if isinstance(frame, Frame)]
    rec = bytearray(REC)
    rec[starts[5]] ^= 1
    kept = [
        frame.start for frame in scan_frames(BytesInMemory(bytes(rec))) if isinstance(frame, Frame)
    ]
    # The one before cannot be told from one whose length is wrong, unless there is an index.
    assert kept == [*starts[:4], *starts[6:]]
    numbers = sorted_array([int(line.split()[1]) for line in IDX.splitlines()])
    indexed = read_indexed_frames(BytesInMemory(bytes(rec)), numbers)
    assert [frame.start for frame in indexed if isinstance(frame, Frame)] == [
        *starts[:5],
        *starts[6:],
    ]


def test_an_index_is_read_in_the_order_of_offsets(tmp_path: Path) -> None:
    path = tmp_path / "train.idx"
    path.write_bytes(b"2\t80\r\n0\t0\n1\t40")
    keys, offsets = read_record_index(str(path))
    assert (keys.tolist(), offsets.tolist()) == ([0, 1, 2], [0, 40, 80])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"0\t0\n1 2 3\n4\n", "line 2, b'1 2 3"),
        (b"0\t0\n\n", "line 2"),
        (b"0\t-4\n", "line 1"),
        (b"0\t1_0\n", "line 1"),
        (b"0\t9999999999999999999999\n", "line 1"),
        (b"\0" * 9000, "line 1"),
        (b"0\t0\n0\t4\n", "key 0 is there twice"),
        (b"0\t4\n1\t4\n", "offset 4 is there twice"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "train.idx"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"{words}.*--no-idx"):
        read_record_index(str(path))


@given(st.binary(max_size=60), st.integers(0, len(IDX)))
def test_any_bytes_are_an_index_or_refused(tmp_path_factory, data: bytes, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.idx"
    path.write_bytes(IDX[:cut] + data + IDX[cut:])
    try:
        keys, offsets = read_record_index(str(path))
    except UserError:
        return
    assert len(keys) == len(offsets) == len(path.read_bytes().splitlines())
