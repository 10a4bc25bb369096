"""A loader process that is killed is reported with the sample it was on, not as a hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError
from pipelines.data import sample
from pipelines.data.decode import Pixels
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.loading import loader_of
from tests.support.waiting import wait_for

VICTIM = "0000042"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.load(tiny.write_shards(tmp_path_factory.mktemp("data") / "train", classes=10))


@pytest.fixture
def config(index: ShardIndex, tmp_path: Path) -> Config:
    return tiny.config(tmp_path, index.folder, data={"loader_workers": 2, "prefetch": 1})


def place_of(index: ShardIndex, key: str) -> str:
    """What messages call the sample."""
    for number, shard in enumerate(index.shards):
        tar = Path(index.url(number)).read_bytes()
        for inside, offset in enumerate(shard.offsets[:-1]):
            if tar[offset:].startswith(key.encode()):
                return index.sample_name(number, inside)
    raise AssertionError(f"no {key} in {index.folder}")


def when_decoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have the process that decodes `VICTIM` do `act` first; loader processes inherit it."""
    original = sample.decode_image
    unpack = sample.extract_sample
    current: list[str] = []

    def watched_unpack(*args: object) -> sample.EncodedSample:
        packed = unpack(*args)
        current[:] = [packed.key]
        return packed

    def decode(data: bytes, side: int, into: Pixels | None, max_pixels: int) -> Pixels:
        if current == [VICTIM]:
            act()
        return original(data, side, into, max_pixels)

    monkeypatch.setattr(sample, "extract_sample", watched_unpack)
    monkeypatch.setattr(sample, "decode_image", decode)


def test_a_process_killed_from_outside(
    index: ShardIndex, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pid"

    def hang() -> None:
        file.with_suffix(".new").write_text(str(os.getpid()))
        file.with_suffix(".new").rename(file)
        time.sleep(10_000)

    def kill() -> None:
        while not file.exists():
            time.sleep(0.01)
        os.kill(int(file.read_text()), signal.SIGKILL)

    when_decoding(monkeypatch, hang)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RunError) as caught:
        list(loader_of(index, config, range(4), 0, 4))
    killer.join()
    assert f"ended with SIGKILL while it decoded {place_of(index, VICTIM)} ({VICTIM})" in str(
        caught.value
    )


@pytest.mark.slow
def test_a_decoder_that_crashes(
    index: ShardIndex, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_decoding(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(RunError, match=rf"ended with SIGSEGV while it decoded .* \({VICTIM}\)"):
        list(loader_of(index, config, range(4), 0, 4))


@pytest.mark.slow
def test_a_death_during_the_step_has_its_name_too(index: ShardIndex, config: Config) -> None:
    loader = loader_of(index, config, range(4), 0, 10_000)
    with (
        pytest.raises(
            RunError, match=r"loader process [01] ended with SIGKILL while it .* sample \d+ of"
        ),
        loader.reporting_dead_workers(),
    ):
        for _ in loader:
            [child, *_] = _children()
            os.kill(child, signal.SIGKILL)
            wait_for(lambda: False)  # the step; torch's signal handler ends it


def test_another_failure_of_the_step_stays_what_it_is(index: ShardIndex, config: Config) -> None:
    """Also when the loader's processes have ended, as they do before the last steps."""
    loader = loader_of(index, config, range(4), 0, 2)
    with pytest.raises(RuntimeError, match="out of memory"), loader.reporting_dead_workers():
        assert len(list(loader)) == 2
        raise RuntimeError("out of memory")


def _children() -> list[int]:
    """Process ids of this process's children that load data."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid]
