"""Loader processes outlive a SIGTERM that is meant for their rank, and never the rank itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mhe_dist.config.schema import Config
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.loading import loader_of
from tests.support.waiting import WATCHDOG_S, wait_for

LOADERS = 2
# torch's own processes look for their parent every 5 s: not in this test.
RANK = """
import sys
from torch.utils.data import _utils
_utils.worker.MP_STATUS_CHECK_INTERVAL = 10_000
from mhe_dist.config.load import load_config
from pipelines.shards.index import ShardIndex
from tests.support.data.loading import loader_of
config = load_config(sys.argv[1])
for step in loader_of(ShardIndex.load(config.data.shards), config, range(4), 0, 10_000):
    print("a step", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    shards = tiny.write_shards(tmp_path / "shards")
    return tiny.config(tmp_path, shards, data={"loader_workers": LOADERS, "prefetch": 1})


def keys(config: Config, after_step: Callable[[], None] = lambda: None) -> list[list[str]]:
    """Keys of the samples of each micro-batch of some steps."""
    found = []
    for step in loader_of(ShardIndex.load(config.data.shards), config, range(4), 0, 6):
        found += [part.keys for part in step.micro_batches]
        after_step()
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still does something; where nobody waits for it, a zombie stays."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_sigterm_to_the_loader_processes_changes_nothing(config: Config) -> None:
    """Neither while they work nor when the rank's own thread is told meanwhile."""

    def tell_everybody() -> None:
        if loaders := children():  # by another process: what the rank sends does end them
            subprocess.run(["kill", "-TERM", *map(str, loaders)], check=False)

    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        uninterrupted = keys(config)
        assert keys(config, tell_everybody) == uninterrupted
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM], "the rank itself hears it again after it has begun to load"


def test_ctrl_c_waits_until_the_loader_processes_have_begun_and_leaves_them_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised while Python forks it was lost, and the lock of `logging` stayed taken."""
    fork, forked = os.fork, []

    def fork_interrupted() -> int:
        signal.raise_signal(signal.SIGINT)
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", fork_interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            keys(config)
        assert len(forked) == LOADERS, "none was broken off"
        monkeypatch.undo()

        def interrupt_loaders() -> None:
            for child in children():
                os.kill(child, signal.SIGINT)

        uninterrupted = keys(config)
        assert keys(config, interrupt_loaders) == uninterrupted
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_rank_ends_them_at_once(config: Config) -> None:
    """Also those that are asked for nothing any more."""
    steps = iter(loader_of(ShardIndex.load(config.data.shards), config, range(4), 0, 10_000))
    next(steps)
    started = multiprocessing.active_children()
    assert len(started) == LOADERS
    for child in started:
        child.terminate()  # what multiprocessing does when a process ends; it then waits for ever
        child.join(WATCHDOG_S)
    assert [child.exitcode for child in started] == [0] * LOADERS


@pytest.mark.slow
def test_they_end_with_a_rank_that_is_killed(config: Config, tmp_path: Path) -> None:
    from mhe_dist.config.write import save_config

    save_config(config, str(tmp_path / "run.yaml"))
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path / "run.yaml")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None and rank.stdout.readline() == "a step\n"
    loaders = psutil.Process(rank.pid).children(recursive=True)
    assert len(loaders) >= LOADERS
    rank.kill()
    rank.wait()
    wait_for(lambda: not any(map(is_alive, loaders)))
