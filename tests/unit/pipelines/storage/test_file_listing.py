"""Files below a folder, here and in a store: all of them, in the order of their whole paths."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from mhe_dist.errors import UserError
from pipelines.storage import file_listing
from pipelines.storage.file_listing import list_files

# A folder `a` stands where its paths do: behind `a-b/1`, before `a0`.
NAMES = ["a/2.jpg", "a/10.jpg", "a-b/1.jpg", "a0.jpg", "a/b/c.jpg", "a.jpg", "b/x.jpg"]
HIDDEN = [".x/1.jpg", "a/.thumb/1.jpg", "a/.y.jpg", ".z.jpg"]


def test_a_folder_of_this_machine(tmp_path: Path) -> None:
    for name in NAMES + HIDDEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    assert list(list_files(str(tmp_path))) == [(name, 2) for name in sorted(NAMES)]


@pytest.mark.parametrize("ahead", [1, 2, 16])
def test_a_store(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_listing, "_AHEAD", ahead)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/listed/{name}": b"12" for name in NAMES + HIDDEN})
    try:
        assert list(list_files("memory://listed")) == [(name, 2) for name in sorted(NAMES)]
        with pytest.raises(UserError, match="memory://none: no such folder"):
            list(list_files("memory://none"))
        file = r"a/2\.jpg: is a file, and a folder is needed: memory://listed/a holds it"
        with pytest.raises(UserError, match=file):
            list(list_files("memory://listed/a/2.jpg"))
    finally:
        filesystem.rm("/listed", recursive=True)
