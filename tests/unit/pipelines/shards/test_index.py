"""The index of a data set: what it says of the tars, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.shards.packing import pack_offsets
from pipelines.shards.shard import Shard
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.shard_sets import PACKED, tables, write_set


def test_index_round_trip(tmp_path: Path) -> None:
    written = write_set(str(tmp_path / "set"))
    for url in (tmp_path / "set", tmp_path / "set" / "index.json", f"{tmp_path}/set/"):
        loaded = ShardIndex.load(str(url))
        assert tables(loaded) == tables(written)
        assert loaded.digest == written.digest
    assert loaded == ShardIndex.load(written.folder)
    assert (loaded.samples, loaded.num_classes, loaded.meta) == (8, 8, {"colour": "grün"})
    assert list(loaded.starts) == [0, 5, 8]
    assert [shard.url for shard in loaded.shards] == ["part-000000.tar", "part-000001.tar"]


def test_sizes_and_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    index = write_set(str(tmp_path / "set"))
    for number, shard in enumerate(index.shards):
        content = Path(index.url(number)).read_bytes()
        assert shard.bytes == len(content)
        assert shard.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_sample_can_be_cut_out_by_its_offsets(tmp_path: Path) -> None:
    index = write_set(str(tmp_path / "set"))
    with tarfile.open(index.url(0)) as tar:
        begins = [member.offset for member in tar if member.name.endswith(".bin")]
    assert list(index.shards[0].offsets[:-1]) == begins
    assert len(index.shards[0].offsets) == 6


def test_digest_tells_contents_and_classes_apart() -> None:
    write_set("memory://digest/a")
    index = ShardIndex.load("memory://digest/a")
    other = ShardIndex("elsewhere", index.num_classes, index.shards)
    assert other.digest == index.digest
    assert ShardIndex(index.folder, 9, index.shards).digest != index.digest
    assert ShardIndex(index.folder, 8, index.shards[::-1]).digest != index.digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "index.json is missing"),
        ("{", "not JSON"),
        ("[]", "not an index of format mhe-shards-1 or mhe-shards-2"),
        ('{"format": "mhe-shards-9"}', "not an index of format mhe-shards-1 or mhe-shards-2"),
        ('{"format": "mhe-shards-1", "shards": [{}]}', "damaged"),
        ('{"format": "mhe-shards-2", "shards": [{}]}', "damaged"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=words):
        ShardIndex.load(str(tmp_path))


def test_index_is_plain_json(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"))
    content = json.loads((tmp_path / "set" / "index.json").read_text())
    assert content["samples"] == 8
    assert set(content["shards"][0]) == {"url", "samples", "bytes", "checksum", "end"}
    assert (
        content["columns"]["begins"]["dtype"] == content["columns"]["labels"]["dtype"] == "uint16"
    )
    assert np.load(tmp_path / "set" / "begins.npy").tolist() == [0, 3, 7, 11, 15, 0, 4, 8]
    assert np.load(tmp_path / "set" / "labels.npy").tolist() == list(range(8))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("own", "0649b2290b830a96fce1f6a71dc9a2d62e9be5654f1cb25cc3cfeb4f3a10c8c8"),
        ("foreign", "39ceb0b0d94aa25f1b1fb18a628cd62c74d136b679643ac7672d9015339cedd9"),
    ],
)
def test_an_index_of_before_is_read_as_before_and_keeps_its_digest(
    tmp_path: Path, name: str, digest: str
) -> None:
    index = ShardIndex.load(str(PACKED / name))
    assert index.is_packed
    assert index.digest == f"sha256:{digest}"
    expected = {
        "own": [
            ([0, 1536, 3584, 5632, 7680, 9728], [0, 1, 2, 3, 4]),
            ([0, 2048, 4096, 6144], [5, 6, 7]),
        ],
        "foreign": [
            ([0, 2560, 5120, 7680], [0, 1, 0]),
            ([0, 2560], [2]),
            ([0, 2560, 5120], [1, 0]),
        ],
    }[name]
    assert [row[-2:] for row in tables(index)] == expected
    replace(index, folder=str(tmp_path)).save()
    mapped = ShardIndex.load(str(tmp_path))
    assert not mapped.is_packed
    assert (mapped.digest, mapped.meta, tables(mapped)) == (index.digest, index.meta, tables(index))
    for number, shard in enumerate(index.shards):
        for start in range(shard.samples):
            assert mapped.entry(number, start) == index.entry(number, start)
            assert mapped.shards[number].label(start) == shard.label(start)
            for stop in range(start, shard.samples + 1):
                pair = shard.bounds(start, stop), mapped.shards[number].bounds(start, stop)
                assert pair[0].tolist() == pair[1].tolist()


@pytest.mark.parametrize("text", ["", "?", "AAAA", pack_offsets(range(0, 5120, 512))])
def test_a_damaged_table_names_its_shard(text: str) -> None:
    shard = Shard("a.tar", 3, 0, "", text, text or "=")
    for table in (lambda: shard.offsets, lambda: shard.labels, lambda: shard.bounds(0, 1)):
        with pytest.raises(UserError, match=r"the entry of a\.tar is damaged"):
            table()


def test_the_index_holds_the_labels(tmp_path: Path) -> None:
    index = ShardIndex.load(write_set(str(tmp_path / "set")).folder)
    assert [shard.labels.tolist() for shard in index.shards] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    with ShardWriter(str(tmp_path / "other"), "part") as writer:
        assert writer.write([Sample("a", {"cls": b"cat"})]).labels is None


@pytest.mark.parametrize("name", ["own", "own packed"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 1500),
)
def test_a_damaged_index_is_read_or_refused(
    tmp_path: Path, name: str, changes: list[tuple[int, int]], length: int
) -> None:
    if not index_exists(str(tmp_path / "set")):
        write_set(str(tmp_path / "set"))
    set_folder = tmp_path / "set" if name == "own" else PACKED / "own"
    content = bytearray((set_folder / "index.json").read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    shutil.copytree(set_folder, tmp_path / "damaged", dirs_exist_ok=True)
    (tmp_path / "damaged" / "index.json").write_bytes(content[:length] or content)
    try:
        index = ShardIndex.load(str(tmp_path / "damaged"))
        for number, shard in enumerate(index.shards):
            assert len(shard.offsets) == shard.samples + 1
            assert shard.labels is None or len(shard.labels) == shard.samples
            assert index.url(number)
    except UserError as error:
        assert "index" in str(error)
