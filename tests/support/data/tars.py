"""Tars in memory, by the standard library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable


def tar(*members: tuple[str, bytes], style: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    """A tar of names and data; see `add_members`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=style) as archive:
        add_members(archive, members, **fields)
    return stream.getvalue()


def add_members(
    archive: tarfile.TarFile, members: Iterable[tuple[str, bytes]], **fields: object
) -> None:
    """Add names and data, each header with these fields; a name that ends with / is a folder."""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        if name.endswith("/"):
            info.type = tarfile.DIRTYPE
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data))
