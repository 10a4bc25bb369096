"""Files that appear complete or not at all, on a disk and in a store, and what is left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fsspec
import pytest

from pipelines.storage.urls import atomic_write


def test_what_a_store_gets_has_no_name_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was ended while it wrote a tar left 128 MiB in TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with atomic_write("memory://bucket/named.bin") as stream:
        stream.write(b"x" * 100_000)
        stream.flush()
        assert list(tmp_path.iterdir()) == []
    assert fsspec.filesystem("memory").cat_file("/bucket/named.bin") == b"x" * 100_000


@pytest.mark.parametrize("store", ["memory://bucket", "disk"])
def test_a_block_that_fails_leaves_nothing(store: str, tmp_path: Path) -> None:
    folder = store if "://" in store else str(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_write(f"{folder}/broken.bin") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert not fsspec.open(f"{folder}/broken.bin").fs.exists(f"{folder}/broken.bin")
    assert list(tmp_path.iterdir()) == []
