"""Shards: written at once or not at all, and readable by anybody."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.shards.index import Fault, Shard, ShardIndex, index_exists
from pipelines.shards.packing import pack_labels, pack_offsets, unpack_labels, unpack_offsets
from pipelines.shards.writer import Sample, ShardWriter


def some(count: int, first: int = 0) -> list[Sample]:
    return [
        Sample(f"k{i:03d}", {"bin": bytes([i % 256]) * (i * 37), "cls": str(i).encode()})
        for i in range(first, first + count)
    ]


def write(folder: str) -> ShardIndex:
    with ShardWriter(folder, "part") as writer:
        writer.write(some(5))
        writer.write(some(3, first=5))
        return writer.finish(8, {"colour": "grün"})


def test_index_round_trip(tmp_path: Path) -> None:
    written = write(str(tmp_path / "set"))
    for url in (tmp_path / "set", tmp_path / "set" / "index.json", f"{tmp_path}/set/"):
        loaded = ShardIndex.load(str(url))
        assert loaded == written
        assert loaded.digest == written.digest
    assert (loaded.samples, loaded.num_classes, loaded.meta) == (8, 8, {"colour": "grün"})
    assert list(loaded.starts) == [0, 5, 8]
    assert [shard.url for shard in loaded.shards] == ["part-000000.tar", "part-000001.tar"]


def test_sizes_and_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    index = write(str(tmp_path / "set"))
    for number, shard in enumerate(index.shards):
        content = Path(index.url(number)).read_bytes()
        assert shard.bytes == len(content)
        assert shard.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_sample_can_be_cut_out_by_its_offsets(tmp_path: Path) -> None:
    index = write(str(tmp_path / "set"))
    with tarfile.open(index.url(0)) as tar:
        begins = [member.offset for member in tar if member.name.endswith(".bin")]
    assert list(index.shards[0].offsets[:-1]) == begins
    assert len(index.shards[0].offsets) == 6


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    write(str(tmp_path / "set"))
    url = f"{tmp_path}/set/part-{{000000..000001}}.tar"
    read = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [(s["__key__"], s["bin"], s["cls"]) for s in read] == [
        (s.key, s.members["bin"], s.members["cls"]) for s in some(8)
    ]


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    assert write(str(tmp_path / "a")).digest == write(str(tmp_path / "b")).digest


def test_digest_tells_contents_and_classes_apart() -> None:
    write("memory://digest/a")
    index = ShardIndex.load("memory://digest/a")
    other = ShardIndex("elsewhere", index.num_classes, index.shards)
    assert other.digest == index.digest
    assert ShardIndex(index.folder, 9, index.shards).digest != index.digest
    assert ShardIndex(index.folder, 8, index.shards[::-1]).digest != index.digest


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(str(tmp_path / "set"), "part") as writer:
        writer.write(some(5))
        assert not (tmp_path / "set").exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists; delete it or choose another"):
        ShardWriter(str(tmp_path / "set"), "part")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert not index_exists(str(tmp_path / "set"))
    write(str(tmp_path / "set"))
    assert index_exists(str(tmp_path / "set"))


@pytest.mark.parametrize("key", ["", "a.b", "__meta__"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str) -> None:
    with (
        pytest.raises(ValueError, match="cannot be the key"),
        ShardWriter(str(tmp_path / "set"), "part") as writer,
    ):
        writer.write([Sample(key, {"cls": b"1"})])


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
    write(str(tmp_path / "set"))
    content = json.loads((tmp_path / "set" / "index.json").read_text())
    assert content["samples"] == 8
    fields = {"url", "samples", "bytes", "checksum", "blocks", "classes"}
    assert set(content["shards"][0]) == fields


@settings(deadline=None)
@given(st.lists(st.integers(1, 2**20), max_size=50), st.integers(0, 3))
def test_offsets_round_trip(lengths: list[int], first: int) -> None:
    offsets = [first * 512]
    for length in lengths:
        offsets.append(offsets[-1] + 512 * length)
    assert list(unpack_offsets(pack_offsets(offsets), len(offsets))) == offsets


@given(st.lists(st.integers(0, 2**63 - 1), max_size=50))
def test_labels_round_trip(labels: list[int]) -> None:
    assert unpack_labels(pack_labels(labels), len(labels)).tolist() == labels


@pytest.mark.parametrize("text", ["", "?", "AAAA", pack_offsets(range(0, 5120, 512))])
def test_a_damaged_table_names_its_shard(text: str) -> None:
    shard = Shard("a.tar", 3, 0, "", text, text or "=")
    for table in ("offsets", "labels"):
        with pytest.raises(UserError, match=r"the entry of a\.tar is damaged"):
            getattr(shard, table)


def test_the_index_holds_the_labels(tmp_path: Path) -> None:
    index = ShardIndex.load(write(str(tmp_path / "set")).folder)
    assert [shard.labels.tolist() for shard in index.shards] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    with ShardWriter(str(tmp_path / "other"), "part") as writer:
        assert writer.write([Sample("a", {"cls": b"cat"})]).labels is None


RECIPE = {"made": "from eggs"}


def samples_of(task: int) -> list[Sample | Fault]:
    return [*some(3, first=3 * task), Fault(f"egg {task}", "cracked")]


def spoiled(task: int) -> list[Sample | Fault]:
    if task == 2:
        raise KeyboardInterrupt
    return samples_of(task)


def unmade(task: int) -> list[Sample | Fault]:
    raise AssertionError(f"{task} was finished already")


@pytest.mark.parametrize("where", ["", "memory://resume"])
def test_an_interrupted_attempt_goes_on(tmp_path: Path, where: str) -> None:
    target = where or str(tmp_path / "set")
    with pytest.raises(KeyboardInterrupt), ShardWriter(target, "part", RECIPE) as writer:
        writer.write_all(spoiled, range(4))
    assert not index_exists(target)
    with pytest.raises(UserError, match="another source or other settings"):
        ShardWriter(target, "part", {"made": "from milk"})
    made: list[int] = []
    with ShardWriter(target, "part", RECIPE) as writer:
        faults = writer.write_all(lambda task: made.append(task) or samples_of(task), range(4))
        index = writer.finish(12)
    assert (made, writer.reused) == ([2, 3], 2)
    assert faults == [Fault(f"egg {task}", "cracked") for task in range(4)]
    with ShardWriter(str(tmp_path / "at once"), "part") as writer:
        writer.write_all(samples_of, range(4))
        assert writer.finish(12).digest == index.digest == ShardIndex.load(target).digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_finished_tar_that_has_changed_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(str(tmp_path / "set"), "part", 1) as writer:
        writer.write_all(spoiled, range(4))
    (hidden,) = tmp_path.iterdir()
    (hidden / "part-000000.tar").write_bytes(b"half")
    (hidden / ".part-000002.tar.1.tmp").write_bytes(b"half")
    with ShardWriter(str(tmp_path / "set"), "part", 1) as writer:
        writer.write_all(samples_of, range(4))
        writer.finish(12)
    assert writer.reused == 1
    content = Path(writer.folder, "part-000000.tar").read_bytes()
    checksum = ShardIndex.load(writer.folder).shards[0].checksum
    assert checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert sorted(path.name for path in Path(writer.folder).iterdir()) == [
        "index.json",
        *(f"part-00000{number}.tar" for number in range(4)),
    ]


def test_an_attempt_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path / "set"), "part", RECIPE):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_target_are_kept_apart(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "set"), "part", RECIPE) as writer:
        writer.write(some(1))
        with pytest.raises(UserError, match="another process is making it"):
            ShardWriter(str(tmp_path / "set"), "part", RECIPE)


@pytest.mark.slow
def test_processes_write_what_one_would(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with (
        ShardWriter(str(tmp_path / "two"), "part") as two,
        ShardWriter(str(tmp_path / "one"), "part") as one,
    ):
        faults = two.write_all(samples_of, range(5), 2, lambda *counts: seen.append(counts))
        assert faults == one.write_all(samples_of, range(5))
        assert two.finish(15).digest == one.finish(15).digest
    assert seen == [(number, 5) for number in range(6)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 1500),
)
def test_a_damaged_index_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], length: int
) -> None:
    if not index_exists(str(tmp_path / "set")):
        write(str(tmp_path / "set"))
    content = bytearray((tmp_path / "set" / "index.json").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
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
