"""Streaming from stores: little is read, nothing is lost, and memory stays flat."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from mhe_dist.config.schema import Config
from pipelines.data.order import SampleOrder
from pipelines.data.sequential import read_in_order
from pipelines.loader.loader import Loader
from pipelines.loader.prefetch import WindowReader
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.images import jpeg
from tests.support.data.loading import Loaded, assert_same, load, loader_of
from tests.support.servers.stores import Counted, Faulty, Synthetic, files, served

pytestmark = pytest.mark.usefixtures("prompt_retries")

SIDE, CLASSES, STREAMS, STEP = 8, 10, 8, 16
SIZES = [60, 40, 1, 99, 56]  # 256 samples: 16 steps are an epoch of every stream
SAMPLES = sum(SIZES)


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """Of a local data set."""
    numbers = iter(range(SAMPLES))
    with ShardWriter(str(tmp_path / "set"), "part") as writer:
        for size in SIZES:
            picked = [next(numbers) for _ in range(size)]
            writer.write(
                Sample(f"s{n:03d}", {"jpg": jpeg(n), "cls": str(n % CLASSES).encode()})
                for n in picked
            )
        return writer.finish(CLASSES)


def configure(window: int = 5, workers: int = 0, **remote: Any) -> Config:
    """A step is two samples of each of eight streams."""
    return Config(
        run={"seed": 3},
        data={
            "shards": "unused",
            "streams": STREAMS,
            "shuffle_window": window,
            "image_size": SIDE,
            "loader_workers": workers,
            "max_bad_fraction": 1,
            "remote": remote,
        },
        train={"global_batch": STEP, "micro_batch": 4},
    )


def load_all(loader: Loader) -> Loaded:
    """All micro-batches; a loader that left anything out fails."""
    found = load(loader)
    assert loader.faults.count == 0
    return found


def keys_of(loaded: Loaded) -> list[str]:
    return sorted(key for batch in loaded.values() for key in batch[2])


GIGABYTES = Synthetic(shards=80, samples=1024, sample_bytes=128 << 10)


@pytest.mark.parametrize("step", [2560, 2561, 4001])
def test_a_resume_in_ten_gigabytes_reads_three_windows_of_each_stream(step: int) -> None:
    index, window = GIGABYTES.index, 32
    assert sum(shard.bytes for shard in index.shards) > 10e9
    Counted.begin(GIGABYTES.content)
    loader = loader_of(index, configure(window), range(4), step, 5000)
    [first] = [batch for batch, _ in zip(loader, range(1), strict=False)]
    assert len({key for micro in first.micro_batches for key in micro.keys}) == STEP
    for micro in first.micro_batches:
        assert micro.labels.tolist() == [int(key[4:]) % CLASSES for key in micro.keys]
    limit = STREAMS * (2 + 1) * window * GIGABYTES.size
    assert STREAMS * GIGABYTES.size < Counted.bytes.value <= limit


@pytest.fixture
def remote(index: ShardIndex) -> ShardIndex:
    """The same data set behind a URL."""
    return ShardIndex(f"counted://{index.folder}", CLASSES, index.shards)


def test_reading_ahead_changes_who_reads_and_not_what(
    index: ShardIndex, remote: ShardIndex
) -> None:
    expected = load_all(loader_of(index, configure(window=16), range(4), 3, 40))
    for mib, readers in ((256, {"read-ahead"}), (0, {threading.current_thread().name})):
        Counted.begin()
        config = configure(window=16, read_ahead_mib=mib)
        assert_same(load_all(loader_of(remote, config, range(4), 3, 40)), expected)
        assert Counted.threads == readers


def test_nothing_is_read_twice_or_for_nothing(remote: ShardIndex) -> None:
    Counted.begin()
    load_all(loader_of(remote, configure(), range(4), 0, SAMPLES // STEP))
    offsets = [shard.offsets for shard in remote.shards]
    assert Counted.bytes.value == sum(int(o[-1] - o[0]) for o in offsets)


def test_local_shards_are_not_read_ahead(index: ShardIndex) -> None:
    before = threading.enumerate()  # those of another test may be about to end
    loader = iter(loader_of(index, configure(), range(4), 0, 16))
    next(loader)
    begun = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in begun if name.startswith("read-ahead")]


def test_what_is_read_ahead_is_bounded() -> None:
    data = Synthetic(shards=8, samples=64, sample_bytes=64 << 10)
    Counted.begin(data.content)
    order = SampleOrder([64] * 8, STREAMS, 8, seed=0)
    remote = configure(read_ahead_mib=1).data.remote  # two windows of 512 KiB
    with WindowReader(data.index, order, remote, range(0, 1000)) as reader:
        reader.prefetch(range(STREAMS), 0)
        taken = [reader.read(order.window_at(stream, 0)[0]) for stream in (0, 1)]
        assert Counted.bytes.value <= 1 << 20
        reader.prefetch(range(2, STREAMS), 0)
        taken.append(reader.read(order.window_at(2, 0)[0]))
        assert Counted.bytes.value <= 2 << 20
    assert [len(found.samples) for found in taken] == [8, 7, 6]


@pytest.fixture
def s3(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A store with the data set in `s3://faulty/set`; our retries alone make up for its faults."""
    server = pytest.importorskip("moto.moto_server.werkzeug_app")
    s3fs = pytest.importorskip("s3fs")
    app = Faulty(server.DomainDispatcherApplication(server.create_backend_app))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with served(app) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        app.is_on = False
        filesystem = fsspec.filesystem("s3")
        filesystem.makedirs("faulty", exist_ok=True)
        filesystem.put(f"{index.folder}/", "faulty/set", recursive=True)
        app.is_on = True
        yield app
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_from_a_store_that_fails(s3: Faulty, index: ShardIndex, workers: int) -> None:
    expected = load_all(loader_of(index, configure(), range(4), 0, 16))
    found = load_all(
        loader_of(ShardIndex.load("s3://faulty/set"), configure(workers=workers), range(4), 0, 16)
    )
    assert_same(found, expected)
    assert keys_of(found) == [f"s{number:03d}" for number in range(SAMPLES)]
    assert s3.requests > 60
    assert s3.faults >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_from_a_web_server_that_fails(index: ShardIndex, workers: int) -> None:
    expected = load_all(loader_of(index, configure(), range(4), 0, 16))
    app = Faulty(files(Path(index.folder)))
    with served(app) as url:
        loader = loader_of(ShardIndex.load(url), configure(workers=workers), range(4), 0, 16)
        found = load_all(loader)
        assert_same(found, expected)
        assert len(read_in_order(ShardIndex.load(url), 0, SAMPLES, SIDE)[2]) == SAMPLES
    assert keys_of(found) == [f"s{number:03d}" for number in range(SAMPLES)]
    assert app.faults >= 2


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    data = Synthetic(shards=4, samples=64, sample_bytes=64 << 10)  # 16 MiB an epoch
    Counted.begin(data.content)
    loader = loader_of(data.index, configure(window=8, workers=1), range(4), 0, 20 * 16)
    others = set(psutil.Process().children())
    memory = []
    for batch in loader:
        if batch.step % 16 == 15:
            [process] = set(psutil.Process().children()) - others
            memory.append(process.memory_info().rss >> 20)
    assert len(memory) == 20
    assert statistics.median(memory[15:]) - statistics.median(memory[5:10]) < 8
