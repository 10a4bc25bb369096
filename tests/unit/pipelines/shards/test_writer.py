"""Shards: written at once or not at all, and readable by anybody."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import webdataset

from mhe_dist.errors import UserError
from pipelines.shards.index import Fault, ShardIndex, index_exists
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.storage.worker_pool import Processes
from tests.support.data.shard_sets import some_samples, write_set


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"))
    url = f"{tmp_path}/set/part-{{000000..000001}}.tar"
    read = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [(s["__key__"], s["bin"], s["cls"]) for s in read] == [
        (s.key, s.members["bin"], s.members["cls"]) for s in some_samples(8)
    ]


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    assert write_set(str(tmp_path / "a")).digest == write_set(str(tmp_path / "b")).digest


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(str(tmp_path / "set"), "part") as writer:
        writer.write(some_samples(5))
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
    write_set(str(tmp_path / "set"))
    assert index_exists(str(tmp_path / "set"))


@pytest.mark.parametrize("key", ["", "a.b", "__meta__"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str) -> None:
    with (
        pytest.raises(ValueError, match="cannot be the key"),
        ShardWriter(str(tmp_path / "set"), "part") as writer,
    ):
        writer.write([Sample(key, {"cls": b"1"})])


RECIPE = {"made": "from eggs"}


def samples_of(task: int) -> list[Sample | Fault]:
    return [*some_samples(3, first=3 * task), Fault(f"egg {task}", "cracked")]


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
        "begins.npy",
        "index.json",
        "labels.npy",
        *(f"part-00000{number}.tar" for number in range(4)),
    ]


def test_an_attempt_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path / "set"), "part", RECIPE):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_target_are_kept_apart(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "set"), "part", RECIPE) as writer:
        writer.write(some_samples(1))
        with pytest.raises(UserError, match="another process is making it"):
            ShardWriter(str(tmp_path / "set"), "part", RECIPE)


@pytest.mark.slow
def test_processes_write_what_one_would(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with (
        ShardWriter(str(tmp_path / "two"), "part") as two,
        ShardWriter(str(tmp_path / "one"), "part") as one,
    ):
        faults = two.write_all(
            samples_of, range(5), Processes(2), lambda *counts: seen.append(counts)
        )
        assert faults == one.write_all(samples_of, range(5))
        assert two.finish(15).digest == one.finish(15).digest
    assert seen == [(number, 5) for number in range(6)]
