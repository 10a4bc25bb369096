"""The index of a data set: what it says of the tars, and what is refused."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.shards.index import Shard, ShardIndex, index_exists
from pipelines.shards.packing import pack_offsets
from pipelines.shards.writer import Sample, ShardWriter
from tests.shard_sets import write_set


def test_index_round_trip(tmp_path: Path) -> None:
    written = write_set(str(tmp_path / "set"))
    for url in (tmp_path / "set", tmp_path / "set" / "index.json", f"{tmp_path}/set/"):
        loaded = ShardIndex.load(str(url))
        assert loaded == written
        assert loaded.digest == written.digest
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
        ("[]", "not an index of format mhe-shards-1"),
        ('{"format": "mhe-shards-9"}', "not an index of format mhe-shards-1"),
        ('{"format": "mhe-shards-1", "shards": [{}]}', "damaged"),
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
    fields = {"url", "samples", "bytes", "checksum", "blocks", "classes"}
    assert set(content["shards"][0]) == fields


@pytest.mark.parametrize("text", ["", "?", "AAAA", pack_offsets(range(0, 5120, 512))])
def test_a_damaged_table_names_its_shard(text: str) -> None:
    shard = Shard("a.tar", 3, 0, "", text, text or "=")
    for table in ("offsets", "labels"):
        with pytest.raises(UserError, match=r"the entry of a\.tar is damaged"):
            getattr(shard, table)


def test_the_index_holds_the_labels(tmp_path: Path) -> None:
    index = ShardIndex.load(write_set(str(tmp_path / "set")).folder)
    assert [shard.labels.tolist() for shard in index.shards] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    with ShardWriter(str(tmp_path / "other"), "part") as writer:
        assert writer.write([Sample("a", {"cls": b"cat"})]).labels is None


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 1500),
)
def test_a_damaged_index_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], length: int
) -> None:
    if not index_exists(str(tmp_path / "set")):
        write_set(str(tmp_path / "set"))
    content = bytearray((tmp_path / "set" / "index.json").read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    (tmp_path / "damaged").mkdir(exist_ok=True)
    (tmp_path / "damaged" / "index.json").write_bytes(content[:length] or content)
    try:
        index = ShardIndex.load(str(tmp_path / "damaged"))
        for number, shard in enumerate(index.shards):
            assert len(shard.offsets) == shard.samples + 1
            assert shard.labels is None or len(shard.labels) == shard.samples
            assert index.url(number)
    except UserError as error:
        assert "index" in str(error)
