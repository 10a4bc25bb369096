"""Columns of an index: mapped, shared, fetched once, never copied; what is damaged is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.bench.scale.index import write_synthetic_index
from pipelines.shards.columns import Column, default_cache_dir, smallest_dtype, write_column
from pipelines.shards.index import ShardIndex
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.shards.shard import Shard
from tests.support.data.shard_sets import write_set
from tests.support.servers.stores import Faulty, files, served

WALK = """
import sys
from pipelines.bench.scale.index import private_bytes, walk
from pipelines.shards.index import ShardIndex
before = private_bytes()
index = ShardIndex.load(sys.argv[1])
walk(index)
print(private_bytes() - before)
"""


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), max_size=4))
def test_a_column_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    folder = str(tmp_path_factory.mktemp("column"))
    flat = [value for part in parts for value in part]
    dtype = smallest_dtype(min(flat, default=0), max(flat, default=0))
    arrays = [np.array(part, np.int64) for part in parts]
    column = Column(folder, write_column(f"{folder}/x.npy", dtype, len(flat), arrays))
    assert column.values.tolist() == np.load(f"{folder}/x.npy").tolist() == flat
    assert not column.values.flags.writeable


@pytest.mark.parametrize(
    ("lowest", "highest", "dtype"),
    [
        *((0, 0, "uint16"), (0, 2**16 - 1, "uint16"), (0, 2**16, "uint32")),
        *((0, 2**32 - 1, "uint32"), (0, 2**32, "int64"), (-1, 0, "int64")),
    ],
)
def test_a_column_takes_few_bytes(lowest: int, highest: int, dtype: str) -> None:
    assert smallest_dtype(lowest, highest) == dtype


def test_an_unfinished_column_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 values where 3 belong"):
        write_column(f"{tmp_path}/x.npy", "uint16", 3, [np.arange(2)])
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2"))


@pytest.mark.parametrize("name", ["begins.npy", "labels.npy"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "the file is missing"),
        (truncate, "has 143 bytes, the index says 144"),
        (other_header, "does not hold 8 values of uint16"),
    ],
)
def test_a_damaged_column_is_refused_when_the_index_is_loaded(
    tmp_path: Path, name: str, damage: object, words: str
) -> None:
    folder = write_set(f"{tmp_path}/set").folder
    damage(Path(folder, name))
    with pytest.raises(UserError, match=words) as caught:
        ShardIndex.load(folder)
    assert f"{folder}/{name}" in str(caught.value)
    assert f"`mhe data index {folder}`" in str(caught.value)


def test_samples_that_end_before_they_begin_are_refused(tmp_path: Path) -> None:
    folder = write_set(f"{tmp_path}/set").folder
    with open(f"{folder}/begins.npy", "r+b") as stream:
        stream.seek(-6, os.SEEK_END)  # the first sample of the last tar
        stream.write(b"\xff\xff")
    index = ShardIndex.load(folder)
    assert index.shards[0].offsets[-1] == 9728
    with pytest.raises(UserError, match=r"begins\.npy.*part-000001\.tar end before they begin"):
        index.shards[1].bounds(0, 1)


def test_what_a_loader_process_gets_is_where_the_columns_are(tmp_path: Path) -> None:
    sizes = []
    for samples in (1000, 100_000):
        folder = f"{tmp_path}/{samples}"
        write_synthetic_index(folder, samples, samples // 10)
        index = ShardIndex.load(folder)
        index.shards[-1].bounds(0, 1)
        index.shards[-1].label(0)
        packed = pickle.dumps(index)
        sizes.append(len(packed))
        copy = pickle.loads(packed)
        assert copy == index
        assert copy.shards[-1].offsets.tolist() == index.shards[-1].offsets.tolist()
    assert sizes[1] < sizes[0] + 200


def test_a_process_that_walks_all_shards_keeps_nothing_of_them(tmp_path: Path) -> None:
    write_synthetic_index(str(tmp_path / "mapped"), 1_000_000)
    (tmp_path / "packed").mkdir()
    index = ShardIndex.load(f"{tmp_path}/mapped")
    packed = [pack(shard) for shard in index.shards]
    about = {"format": "mhe-shards-1", "num_classes": index.num_classes, "meta": {}}
    (tmp_path / "packed" / "index.json").write_text(json.dumps(about | {"shards": packed}))
    assert kept_bytes(tmp_path / "mapped") < 3 << 20
    assert kept_bytes(tmp_path / "packed") > 16 * 1_000_000  # as before: two int64 a sample


def pack(shard: Shard) -> dict[str, object]:
    """A shard in an index of format 1."""
    names = ("url", "samples", "bytes", "checksum")
    tables = {"blocks": pack_offsets(shard.offsets), "classes": pack_labels(shard.labels)}
    return {name: getattr(shard, name) for name in names} | tables


def kept_bytes(folder: Path) -> int:
    """Private memory that a process has more after it has opened and walked an index."""
    command = [sys.executable, "-c", WALK, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHE_CACHE_DIR", f"{tmp_path}/cache")
    return tmp_path / "cache" / "columns"


def test_remote_columns_are_fetched_once_per_node(tmp_path: Path, cache: Path) -> None:
    local = ShardIndex.load(write_set(f"{tmp_path}/set").folder)
    with served(Faulty(files(tmp_path / "set"), share=0.3, seed=1)) as url:
        index = ShardIndex.load(url)
        assert not cache.exists()  # nobody has asked for them
        index.map_columns()
        assert index.digest == local.digest
        names = {path.name for path in cache.iterdir()} - {"lock"}
        assert names == {column.entry.checksum.removeprefix("sha256:") for column in local.columns}
        other = ShardIndex.load(url, f"{tmp_path}/other node")
        other.map_columns()
    # The server is gone: these are the node's own.
    again = pickle.loads(pickle.dumps(index))
    for shard, expected in zip(again.shards, local.shards, strict=True):
        assert shard.offsets.tolist() == expected.offsets.tolist()
        assert shard.labels.tolist() == expected.labels.tolist()
    for name in names:
        assert not os.path.samefile(cache / name, f"{tmp_path}/other node/{name}")


def test_a_remote_column_with_another_checksum_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = Path(write_set(f"{tmp_path}/set").folder)
    data = bytearray((folder / "labels.npy").read_bytes())
    data[-1] ^= 1
    (folder / "labels.npy").write_bytes(data)
    with served(files(folder)) as url:
        index = ShardIndex.load(url)
        with pytest.raises(UserError, match=r"labels\.npy.*checksum is not that of the index"):
            index.map_columns()
    assert len({path.name for path in cache.iterdir()} - {"lock"}) == 1  # begins.npy


def test_a_node_without_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MHE_CACHE_DIR", f"{tmp_path}/file")
    folder = write_set(f"{tmp_path}/set").folder
    with served(files(Path(folder))) as url:
        index = ShardIndex.load(url)
        with pytest.raises(UserError, match=r"cannot be kept in .* MHE_CACHE_DIR"):
            index.map_columns()


def test_the_cache_of_columns_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == "/x/mhe/columns"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == "/home/me/.cache/mhe/columns"
