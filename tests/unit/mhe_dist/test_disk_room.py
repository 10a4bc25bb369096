"""A mapped file has room before it is written; a full disk is an error, not the end by SIGBUS."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from mhe_dist.disk_room import reserve_room
from mhe_dist.errors import RunError


def test_what_is_reserved_has_blocks_and_holds_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"head" + bytes(1 << 20))
    os.truncate(path, 1 << 24)
    before = path.stat().st_blocks
    with path.open("r+b") as file:
        reserve_room(file.fileno(), path, 1 << 22, 1 << 23)
        reserve_room(file.fileno(), path, 7, 7)
    assert (path.stat().st_blocks - before) * 512 >= 1 << 22
    assert path.stat().st_size == 1 << 24
    assert path.read_bytes() == b"head" + bytes((1 << 24) - 4)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_path_the_bytes_and_the_cure(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "rows"
    said = f"{path}: 1,048,576 bytes cannot be reserved: {os.strerror(number)}; buy a disk"
    with path.open("wb") as file, pytest.raises(RunError, match=f"^{re.escape(said)}$"):
        reserve_room(file.fileno(), path, 4096, 4096 + (1 << 20), "buy a disk")
