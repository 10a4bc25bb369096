"""Shards read through the cache of a host: shared, bounded, and whole after a crash."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.data import RemoteConfig
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError
from pipelines.data.order import ShardSpan
from pipelines.loader.loader import Loader
from pipelines.loader.shard_reader import ShardReader, group_nearby_spans
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.storage import ranges
from tests.support.data.images import jpeg
from tests.support.data.loading import loader_of
from tests.support.faults import disk_full
from tests.support.servers.stores import Counted, Synthetic, from_disk
from tests.support.waiting import WATCHDOG_S

SHARDS, EACH, CLASSES = 6, 20, 4
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_and_quick(prompt_retries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_BLOCK", 4096)


@pytest.fixture
def local(tmp_path: Path) -> ShardIndex:
    with ShardWriter(str(tmp_path / "set"), "part") as writer:
        for shard in range(SHARDS):
            numbers = range(shard * EACH, (shard + 1) * EACH)
            writer.write(
                Sample(f"s{n:03d}", {"jpg": jpeg(n), "cls": str(n % CLASSES).encode()})
                for n in numbers
            )
        return writer.finish(CLASSES)


@pytest.fixture
def index(local: ShardIndex) -> ShardIndex:
    """The same behind a URL."""
    Counted.begin()
    return ShardIndex(f"counted://{local.folder}", CLASSES, local.shards)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached(folder: Path, shards: float = 100, index: ShardIndex | None = None) -> RemoteConfig:
    """A cache with room for so many shards."""
    size = 60_000 if index is None else index.shards[0].bytes
    return RemoteConfig(cache_dir=str(folder), cache_gib=shards * size / 2**30, retries=3)


def read(shards: ShardReader, index: ShardIndex, number: int) -> bytes:
    span = ShardSpan(number, 0, EACH)
    return b"".join(shards.read([span], shards.locate(span)).samples)


def truth(index: ShardIndex, number: int) -> bytes:
    path = index.url(number).removeprefix("counted://")
    return Path(path).read_bytes()[: int(index.shards[number].offsets[-1])]


def in_other_process(work: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    process = fork.Process(target=work, args=args)
    process.start()
    return process


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def used(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def entry(index: ShardIndex, number: int) -> str:
    return index.shards[number].checksum.removeprefix("sha256:")


def test_a_shard_is_downloaded_once_and_for_all(index: ShardIndex, folder: Path) -> None:
    for _ in range(2):
        shards = ShardReader(index, cached(folder))
        assert [read(shards, index, n) for n in range(SHARDS)] == [
            truth(index, n) for n in range(SHARDS)
        ]
    assert Counted.bytes.value == sum(shard.bytes for shard in index.shards)
    assert names(folder) == {entry(index, n) for n in range(SHARDS)}
    assert folder.stat().st_mode & 0o077 == 0


def test_processes_share_it(index: ShardIndex, folder: Path) -> None:
    begin = fork.Barrier(3)

    def work() -> None:
        shards = ShardReader(index, cached(folder))
        begin.wait()
        for number in range(SHARDS):
            assert read(shards, index, number) == truth(index, number)

    processes = [in_other_process(work) for _ in range(3)]
    for process in processes:
        process.join(WATCHDOG_S)
        assert process.exitcode == 0
    assert Counted.bytes.value == sum(shard.bytes for shard in index.shards)
    assert len(names(folder)) == SHARDS


def test_a_crash_in_mid_download_leaves_nothing_in_the_way(index: ShardIndex, folder: Path) -> None:
    stuck = fork.Event()

    def content(path: str, start: int, stop: int) -> bytes:
        if start:
            stuck.set()
            signal.pause()
        return from_disk(path, start, stop)

    Counted.begin(content)
    process = in_other_process(lambda: read(ShardReader(index, cached(folder)), index, 0))
    assert stuck.wait(WATCHDOG_S)
    assert names(folder) == {f"{entry(index, 0)}.part"}
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    Counted.begin()
    # Another shard's download sweeps what is left; the same shard's takes it over.
    assert read(ShardReader(index, cached(folder)), index, 1) == truth(index, 1)
    assert names(folder) == {entry(index, 1)}
    (folder / f"{entry(index, 0)}.part").write_bytes(b"left over")
    assert read(ShardReader(index, cached(folder)), index, 0) == truth(index, 0)
    assert names(folder) == {entry(index, 0), entry(index, 1)}


def test_the_longest_unused_gives_way(index: ShardIndex, folder: Path) -> None:
    limit = sum(sorted(shard.bytes for shard in index.shards)[-3:])
    cache = RemoteConfig(cache_dir=str(folder), cache_gib=limit / 2**30)
    shards = ShardReader(index, cache)
    for number in (0, 1, 2, 0, 3):
        assert read(shards, index, number) == truth(index, number)
        assert used(folder) <= limit
    assert names(folder) == {entry(index, number) for number in (0, 2, 3)}


def test_the_bound_holds_at_every_moment(index: ShardIndex, folder: Path) -> None:
    limit = 3 * max(shard.bytes for shard in index.shards)
    cache = RemoteConfig(cache_dir=str(folder), cache_gib=limit / 2**30)
    ShardReader(index, cache)

    def work(seed: int) -> None:
        shards, draws = ShardReader(index, cache), random.Random(seed)
        for _ in range(60):
            number = draws.randrange(SHARDS)
            assert read(shards, index, number) == truth(index, number)

    processes = [in_other_process(work, seed) for seed in range(4)]
    while any(process.is_alive() for process in processes):
        # Sizes grow under this lock alone. Without it, one entry that is gone and the next that
        # came in its place would both be counted when this process has to wait in between.
        with open(folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert used(folder) <= limit
    assert [process.exitcode for process in processes] == [0] * 4
    assert not [name for name in names(folder) if name.endswith(".part")]


def test_what_has_no_room_is_read_without_it(
    index: ShardIndex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardReader(index, cached(folder, 0.5, index))
    for number in range(2):
        assert read(shards, index, number) == truth(index, number)
    assert names(folder) == set()
    assert caplog.text.count("no room in the cache (data.remote.cache_gib)") == 1


def test_an_entry_that_a_crash_of_the_machine_cut_off_is_made_again(
    index: ShardIndex, folder: Path
) -> None:
    read(ShardReader(index, cached(folder)), index, 0)
    (folder / entry(index, 0)).write_bytes(b"")
    assert read(ShardReader(index, cached(folder)), index, 0) == truth(index, 0)


def test_local_shards_use_no_cache(local: ShardIndex, folder: Path) -> None:
    assert read(ShardReader(local, cached(folder)), local, 0) == truth(local, 0)
    assert names(folder) == set()


def test_a_folder_that_cannot_be_used_is_done_without(
    index: ShardIndex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    assert read(ShardReader(index, cached(folder)), index, 0) == truth(index, 0)
    assert "data.remote.cache_dir cannot be used" in caplog.text


def test_a_full_disk_is_done_without(
    index: ShardIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", disk_full)
    assert read(ShardReader(index, cached(folder)), index, 0) == truth(index, 0)
    assert names(folder) == set()


def spoil(at: int, answers: int) -> Callable[[str, int, int], bytes]:
    """A bit falls over in the second block of the first shard, in the first `answers` answers."""
    left = [answers]

    def content(path: str, start: int, stop: int) -> bytes:
        data = bytearray(from_disk(path, start, stop))
        if path.endswith("00000.tar") and start <= at < stop and left[0]:
            left[0] -= 1
            data[at - start] ^= 1
        return bytes(data)

    return content


def loaded(index: ShardIndex, remote: RemoteConfig, rule: str = "skip") -> Loader:
    config = Config(
        data={
            "shards": "unused",
            "streams": 4,
            "shuffle_window": EACH,
            "image_size": 8,
            "loader_workers": 0,
            "on_bad_sample": rule,
            "max_bad_fraction": 1,
            "remote": remote,
        },
        train={"global_batch": 12, "micro_batch": 12},
    )
    loader = loader_of(index, config, range(1), 0, SHARDS * EACH // 12)
    keys = [key for batch in loader for key in batch.micro_batches[0].keys]
    assert len(set(keys)) == SHARDS * EACH
    return loader


def test_bytes_that_were_damaged_on_the_way_are_asked_for_again(
    index: ShardIndex, folder: Path
) -> None:
    Counted.begin(spoil(700, 1))  # in a JPEG, which decodes all the same
    assert loaded(index, cached(folder)).faults.count == 0
    assert read(ShardReader(index, cached(folder)), index, 0) == truth(index, 0)


def test_a_false_checksum_is_a_fault_by_rule(index: ShardIndex, folder: Path) -> None:
    at = int(index.shards[0].offsets[3]) + 900
    Counted.begin(spoil(at, 10**6))
    # Without a cache only what does not decode is noticed.
    assert loaded(index, RemoteConfig()).faults.count == 0
    faults = loaded(index, cached(folder)).faults
    assert set(faults.samples) == {index.url(0)}
    assert "its checksum is not that of the index" in faults.samples[index.url(0)]
    assert entry(index, 0) not in names(folder)
    with pytest.raises(RunError, match=r"part-000000.tar: its checksum is not"):
        loaded(index, cached(folder), "fail")


def test_a_shard_that_is_too_short_is_a_fault(index: ShardIndex, folder: Path) -> None:
    path = Path(index.url(0).removeprefix("counted://"))
    path.write_bytes(path.read_bytes()[: int(index.shards[0].offsets[-1])])
    faults = loaded(index, cached(folder)).faults
    assert "the index says" in faults.samples[index.url(0)]


def test_spans_near_one_another_are_one_request() -> None:
    data = Synthetic(shards=2, samples=64, sample_bytes=16 << 10)
    Counted.begin(data.content)
    shards = ShardReader(data.index, RemoteConfig())
    spans = [
        ShardSpan(0, 3, 4),
        ShardSpan(0, 5, 7),
        ShardSpan(0, 15, 16),
        ShardSpan(0, 25, 26),
        ShardSpan(1, 0, 1),
    ]
    runs = list(group_nearby_spans(data.index, spans))
    assert runs == [spans[:3], spans[3:4], spans[4:]]
    found = [s for run in runs for s in shards.read(run, shards.locate(run[0])).samples]
    names = [bytes(sample[:9]).decode() for sample in found]
    assert names == [f"000-{n:05d}" for n in (3, 5, 6, 15, 25)] + ["001-00000"]
    assert Counted.bytes.value == (13 + 1 + 1) * (16 << 10)
    assert all(len(sample.obj) <= 32 << 10 for sample in found)
