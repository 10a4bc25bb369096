"""The cache of a host: entries in use. For its bound see `loader/test_shard_reader.py`."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.cache import FileCache


def test_an_entry_in_use_may_be_removed(tmp_path: Path) -> None:
    cache = FileCache(str(tmp_path), 10)
    stream = cache.open("a", 8, lambda part: part.write(b"12345678"))
    other = cache.open("b", 8, lambda part: part.write(b"abcdefgh"))
    assert {path.name for path in tmp_path.iterdir()} - {"lock"} == {"b"}
    assert stream is not None
    assert other is not None
    with stream, other:
        assert (stream.read(), other.read()) == (b"12345678", b"abcdefgh")


def test_a_folder_in_it_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "columns").mkdir()
    stream = FileCache(str(tmp_path), 8).open("a", 8, lambda part: part.write(b"12345678"))
    assert stream is not None
    stream.close()
    assert (tmp_path / "columns").is_dir()
