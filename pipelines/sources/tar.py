"""The members of a tar from front to back, with their offsets; everything is checked.

`tarfile` ends silently at a damaged header or where a file was cut off, so that what follows is
lost. Here both are errors that say where. Understands what writers of data sets make:
ustar, PAX and GNU headers, with long names and large sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Final, NamedTuple

BLOCK: Final = 512
_ZERO: Final = bytes(BLOCK)
_LARGEST: Final = 1 << 28  # bytes of a member that is kept in memory
_LARGEST_HEADER: Final = 1 << 20
_CHUNK: Final = 1 << 20
_FILES: Final = b"0\x007"
_WITHOUT_DATA: Final = b"123456"  # links, devices, folders: no data, whatever the size says
_LONG_NAME, _LONG_LINK, _SPARSE = b"LKS"
_LINKS: Final = {b"1"[0]: "hard link", b"2"[0]: "symbolic link"}
_PAX: Final = b"xX"
_PAX_FOR_ALL: Final = b"g"[0]
_SIZE: Final = re.compile(r"[0-9]{1,20}")
_PAX_RECORD: Final = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
# A tar in a compressed form cannot be read from the middle.
_COMPRESSED: Final = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class DamagedTarError(Exception):
    """A tar that cannot be read further; the message says where and why."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(f"byte {at}: {reason}")


class TarMember(NamedTuple):
    """One member.

    Attributes:
        name: its path.
        start: where its first header begins, an extended one included.
        stop: where the next member's header begins.
        data: its content; None if it is no file, or too large for a part of a sample.
        link: `hard link` or `symbolic link` if it is one.
    """

    name: str
    start: int
    stop: int
    data: bytes | None
    link: str = ""


class _Header(NamedTuple):
    name: str
    size: int
    kind: int


def read_members(stream: IO[bytes]) -> Iterator[TarMember]:
    """The members up to the end marker.

    Args:
        stream: read forward only; it is left behind the marker's first block.

    Raises:
        DamagedTar: a bad header, a kind of member that cannot be read, or no end marker.
    """
    at = start = 0
    over: dict[str, str] = {}
    while True:
        block = _read(stream, BLOCK)
        if len(block) < BLOCK:
            raise DamagedTarError(at, "it ends here, without an end marker: perhaps it was cut off")
        if block == _ZERO:
            if at != start:
                raise DamagedTarError(at, "the end marker where a member should begin")
            return
        header = _header(block, at)
        at += BLOCK
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX_FOR_ALL, *_PAX):
            if header.size > _LARGEST_HEADER:
                raise DamagedTarError(at, f"a header of {header.size} bytes")
            more = _extended(_content(stream, at, header.size) or b"", header.kind, at)
            at += _padded(header.size)
            if header.kind == _PAX_FOR_ALL:
                start = at
            else:
                over = more | over  # the first of several counts, as for `tarfile`
            continue
        name, size = over.get("path", header.name), header.size
        if "size" in over:
            if not _SIZE.fullmatch(over["size"]):
                raise DamagedTarError(at, f"a PAX header with the size {over['size'][:40]!r}")
            size = int(over["size"])
        is_folder = header.kind == 0 and header.name.endswith("/")  # as old tars have them
        is_file = header.kind in _FILES and not is_folder
        if header.kind in _WITHOUT_DATA or is_folder:
            size = 0
        data = _content(stream, at, size, is_file and size <= _LARGEST)
        at += _padded(size)
        yield TarMember(name, start, at, data, _LINKS.get(header.kind, ""))
        start, over = at, {}


def rest_is_empty(stream: IO[bytes]) -> bool:
    """Read to the end of the file; return whether only zeros follow the end marker."""
    empty = True
    while chunk := stream.read(_CHUNK):
        empty = empty and not any(chunk)
    return empty


def _header(block: bytes, at: int) -> _Header:
    if at == 0:
        for beginning, (name, tool) in _COMPRESSED.items():
            if block.startswith(beginning):
                raise DamagedTarError(0, f"compressed by {name}; unpack it first ({tool} FILE)")
    try:
        checksum, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        checksum = size = -1
    if size < 0 or not _sums_to(block, checksum):
        raise DamagedTarError(at, "a damaged header" if at else "no tar: it begins with no header")
    kind, name, prefix = block[156], _text(block[:100]), _text(block[345:500])
    if kind == _SPARSE:
        raise DamagedTarError(at, f"{name[:80]!r} is a sparse file")
    if prefix and kind not in (_LONG_NAME, _LONG_LINK):
        name = f"{prefix}/{name}"
    return _Header(name, size, kind)


def _sums_to(block: bytes, checksum: int) -> bool:
    """Whether a header has that checksum; its own field counts as blanks."""
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(rest)
    # Some Unixes added up signed bytes.
    return checksum == total or checksum == total - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """A number field: octal digits, or, for large ones, base 256 behind a set bit."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError(field)
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _extended(data: bytes, kind: int, at: int) -> dict[str, str]:
    """`path` and `size` of the next member, as far as an extended header sets them."""
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {"path": _text(data)}
    records: dict[str, str] = {}
    position = 0
    while match := _PAX_RECORD.match(data, position):
        length, key = int(match[1]), match[2].decode(errors="replace")
        if length <= match.end() - position:
            raise DamagedTarError(at, "a damaged PAX header")
        value = data[match.end() : position + length - 1].decode(errors="surrogateescape")
        records[key] = value
        position += length
    for key in records:
        if key.startswith("GNU.sparse") or (kind == _PAX_FOR_ALL and key in ("path", "size")):
            raise DamagedTarError(at, f"a PAX header with {key[:40]}")
    return {key: records[key] for key in ("path", "size") if key in records}


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _content(stream: IO[bytes], at: int, size: int, keep: bool = True) -> bytes | None:
    """The data of a member without its padding; None if it is not kept."""
    if keep:
        data = _read(stream, _padded(size))
        missing = _padded(size) - len(data)
    else:
        data, missing = b"", _padded(size)
        while missing and (chunk := stream.read(min(_CHUNK, missing))):
            missing -= len(chunk)
    if missing:
        raise DamagedTarError(at, f"the file ends {missing} bytes too early")
    return data[:size] if keep else None


def _read(stream: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes, fewer at the end; in pieces, so that a false size takes no memory."""
    pieces = []
    while size and (piece := stream.read(min(size, _CHUNK))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
