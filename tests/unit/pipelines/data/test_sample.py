"""Samples out of a tar: the quick way and webdataset's agree, and damage has a name."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import simplejpeg
import webdataset.tariterators as tars
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.sample import BadSampleError, decode_sample, parse_members
from tests.support.data.tars import add_members

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
JPEG = simplejpeg.encode_jpeg(PIXELS, quality=95)


def tar(members: dict[str, bytes], **options: int) -> memoryview:
    """One sample as it lies in a tar, without the archive's end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        add_members(archive, members.items())
        end = archive.offset
    return memoryview(stream.getvalue())[:end]


def by_webdataset(raw: memoryview) -> dict[str, bytes]:
    source = {"url": "", "stream": io.BytesIO(raw)}
    [found] = tars.group_by_keys(tars.tar_file_expander([source]))
    return found


names = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=120)


@settings(deadline=None, max_examples=60)
@given(
    names.filter(lambda name: not name.startswith("__") and name.strip() == name),
    st.dictionaries(
        st.sampled_from(["jpg", "cls", "json", "JPG2"]), st.binary(max_size=1500), min_size=1
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_parsing_equals_webdataset(key: str, members: dict[str, bytes], layout: int) -> None:
    if layout == tarfile.USTAR_FORMAT and len(key.encode()) > 90:
        return  # such a tar cannot be written
    raw = tar({f"{key}.{extension}": data for extension, data in members.items()}, format=layout)
    assert parse_members(raw) == by_webdataset(raw)


def test_folders_in_names_are_kept_in_the_key() -> None:
    raw = tar({"a/b.c/0001.jpg": JPEG, "a/b.c/0001.seg.png": b"x"})
    assert parse_members(raw) == by_webdataset(raw)
    assert parse_members(raw)["__key__"] == "a/b.c/0001"


def test_an_example() -> None:
    raw = tar({"k.jpg": JPEG, "k.cls": b" 7\n", "k.json": b"{}"})
    found = decode_sample(raw, len(raw), 8, 10)
    assert (found.key, found.label) == ("k", 7)
    assert np.array_equal(found.image, simplejpeg.decode_jpeg(JPEG))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"k.jpg": JPEG}, "k: no label among jpg"),
        ({"k.cls": b"1", "k.txt": b""}, "k: no image among cls, txt"),
        ({"k.jpg": JPEG, "k.cls": b"one"}, "k.cls: b'one' is no number"),
        ({"k.jpg": JPEG, "k.cls": b"10"}, r"k.cls: label 10 is not in \[0, 10\)"),
        ({"k.jpg": JPEG, "k.cls": b"-1"}, r"k.cls: label -1 is not in \[0, 10\)"),
        ({"k.jpg": JPEG[:200], "k.cls": b"1"}, "k.jpg: "),
        ({"k.jpg": b"GIF", "k.cls": b"1"}, "k.jpg: no image of a known format"),
        ({"k.jpg": JPEG, "l.cls": b"1"}, "2 samples where the index has one"),
        ({}, "0 samples where the index has one"),
    ],
)
def test_damage_has_a_name(members: dict[str, bytes], words: str) -> None:
    raw = tar(members)
    with pytest.raises(BadSampleError, match=words):
        decode_sample(raw, len(raw), 8, 10)


@pytest.mark.parametrize("size", [b"-0000001000", b"-0000002000", b"-1         "])
@pytest.mark.parametrize("alone", [True, False])
def test_a_member_of_negative_size_is_damage(size: bytes, alone: bool) -> None:
    """Its header with a good checksum was read again and again, without end."""
    header = bytearray(tar({"k.jpg": b""})[:512])
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw = memoryview(bytes(header) + bytes(tar({"k.cls": b"1"})))
    with pytest.raises(BadSampleError):
        parse_members(raw, alone)


def test_a_short_read_is_damage_whatever_is_left() -> None:
    raw = tar({"k.jpg": JPEG, "k.cls": b"1"})
    for length in range(0, len(raw), 100):
        with pytest.raises(BadSampleError, match=f"ends {len(raw) - length} bytes too early"):
            decode_sample(raw[:length], len(raw), 8, 10)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2047), st.binary(min_size=1, max_size=40))
def test_overwritten_bytes_are_an_example_or_damage_but_nothing_else(at: int, junk: bytes) -> None:
    raw = bytearray(tar({"k.jpg": JPEG, "k.cls": b"1", "k.json": b"{}"}))
    raw[at : at + len(junk)] = junk[: len(raw) - at]
    try:
        found = decode_sample(memoryview(raw), len(raw), 8, 10)
    except BadSampleError:
        return
    assert 0 <= found.label < 10
    assert found.image.shape in {(8, 8, 3), (8, 8)}
