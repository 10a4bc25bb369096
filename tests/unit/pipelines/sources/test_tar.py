"""Tars of other writers: every member at its place, and no end without a word."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.tar import DamagedTarError, TarMember, read_members, rest_is_empty
from tests.support.data.tars import tar

CONTENTS = {
    "a.jpg": b"x" * 700,
    "a.cls": b"1",
    "deep/" * 40 + "b.jpg": b"y" * 512,
    "zürich/" * 12 + "c.cls": b"",
}
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def odd(data: bytes, size: int, **fields: object) -> bytes:
    """A tar of one member whose header may say anything."""
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512 + 1024)


def read(data: bytes) -> list[TarMember]:
    stream = io.BytesIO(data)
    found = list(read_members(stream))
    assert rest_is_empty(stream)
    return found


def check_against_tarfile(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = []
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            expected.append((info.name, info.offset, content.read() if content else None))
    found = read(data)
    assert [(m.name.rstrip("/"), m.start, m.data) for m in found] == expected
    assert [m.start for m in found[1:]] == [m.stop for m in found[:-1]]


@pytest.mark.parametrize("style", FORMATS[1:])
def test_members_of_all_formats(style: int) -> None:
    check_against_tarfile(tar(*CONTENTS.items(), style=style))
    check_against_tarfile(tar(*CONTENTS.items(), style=style, mtime=1e12, uid=2**40))


def test_a_name_in_two_parts() -> None:
    check_against_tarfile(tar(("deep/" * 25 + "b.jpg", b"1"), style=tarfile.USTAR_FORMAT))


@pytest.mark.parametrize("style", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_what_the_tar_command_writes(tmp_path: Path, style: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.jpg").write_bytes(b"x" * 1000)
    (tmp_path / "in" / "link.jpg").symlink_to("sub/a.jpg")
    command = ["tar", f"--format={style}", "-cf", tmp_path / "out.tar", "-C", tmp_path / "in", "."]
    subprocess.run(command, check=True)
    data = (tmp_path / "out.tar").read_bytes()
    check_against_tarfile(data)
    assert {m.name for m in read(data) if m.data is not None} == {"./sub/a.jpg"}


def test_folders_links_and_comments_are_no_files() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"comment": "by hand"}) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "a.jpg", 0
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    check_against_tarfile(stream.getvalue())
    assert [m.data for m in read(stream.getvalue())] == [None, None, None, b"abc"]


PLAIN = tar(*CONTENTS.items())
EMPTY = bytes(10240)


def test_an_empty_tar() -> None:
    assert read(EMPTY) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "byte 0: it ends here, without an end marker"),
        (b"hello", "byte 0: it ends here"),
        (b"hello" * 500, "byte 0: no tar"),
        (b"\x1f\x8b" + bytes(600), "compressed by gzip; unpack it first .gunzip FILE."),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd"),
        (PLAIN[:300], "byte 0: it ends here"),
        (PLAIN[:900], "byte 512: the file ends 636 bytes too early"),
        (PLAIN[:1536], "byte 1536: it ends here, without an end marker"),
        (PLAIN[:1600] + b"?" + PLAIN[1601:], "byte 1536: a damaged header"),
        (odd(b"", 2**40), "too early"),
        (odd(b"1", 1, type=b"S"), "sparse"),
        (tar(("a.jpg", b"1"), pax_headers={"GNU.sparse.size": "9"}), "GNU.sparse.size"),
        (tar(("a.jpg", b"1"), pax_headers={"size": "9" * 5000}), "with the size '9999"),
        (odd(b"1", 1, type=b"L"), "the end marker where a member"),
        (odd(b"", 2**30, type=b"x"), "a header of 1073741824 bytes"),
    ],
)
def test_every_damage_says_where(data: bytes, words: str) -> None:
    with pytest.raises(DamagedTarError, match=words):
        read(data)


def test_a_global_header_that_renames_is_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"path": "b.jpg"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DamagedTarError, match="a PAX header with path"):
        read(stream.getvalue())


def test_data_behind_the_end_are_noticed() -> None:
    stream = io.BytesIO(PLAIN + PLAIN)
    assert len(list(read_members(stream))) == len(CONTENTS)
    assert not rest_is_empty(stream)


@given(
    st.sampled_from([tar(*CONTENTS.items(), style=style) for style in FORMATS[1:]]),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, 9000),
)
def test_damaged_tars_end_in_an_error_or_in_true_members(
    original: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(original)
    for position, value in changes:
        data[position] = value
    truth = {member.start: member for member in read(original)}
    try:
        found = list(read_members(io.BytesIO(bytes(data[:length]))))
    except DamagedTarError:
        return
    assert len(found) == len(truth) or bytes(data[:length]) != original
    for member in found:
        assert member.start in truth
        changed = any(member.start <= position < member.stop for position, _ in changes)
        assert changed or member == truth[member.start]


@given(st.binary(max_size=2000))
def test_any_bytes_come_to_an_end(data: bytes) -> None:
    for content in (data, PLAIN[:1536] + data):
        try:
            list(read_members(io.BytesIO(content)))
        except DamagedTarError as error:
            assert "byte" in str(error)
