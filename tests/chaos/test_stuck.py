"""A rank that stops without dying: the others do not wait for ever, and say for whom."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.distributed.watchdog import Stuck
from pipelines.pretrain.main import run_pretraining
from tests.support import tiny
from tests.support.rank_processes import environment, free_port
from tests.support.waiting import WATCHDOG_S

pytestmark = pytest.mark.chaos

TIMEOUT_S = 12.0  # more than this machine makes one of two ranks wait


def train(rank: int, port: int, config: dict[str, Any], events: Any) -> None:
    environment(rank, 2, port)

    def on_event(event: dict[str, Any]) -> None:
        events.send(event["event"])

    try:
        run_pretraining(Config.model_validate(config), on_event)
    except Stuck as stuck:
        events.send(str(stuck))
    os._exit(1)  # as a failed rank does: without entering another collective


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(tmp_path: Path, stopped: int) -> None:
    shards = tiny.write_shards(tmp_path / "shards")
    config = tiny.config(
        tmp_path, shards, train={"max_steps": 5000}, scale={"workers": 2, "timeout_s": TIMEOUT_S}
    )
    context, port = multiprocessing.get_context("forkserver"), free_port()
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=train, args=(rank, port, config.model_dump(), pipes[rank][1]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        while pipes[0][0].recv() != "metrics":
            pass
        pid = ranks[stopped].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        events = pipes[1 - stopped][0]
        message = "metrics"
        while message in ("metrics", "checkpoint"):
            assert events.poll(WATCHDOG_S)
            message = events.recv()
        waited = time.monotonic() - begin
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert message.startswith(f"rank {1 - stopped} of 2 failed in ")
    assert " of step " in message
    missing = "rank 0 does not answer" if stopped == 0 else "not heard from: rank 1"
    assert message.endswith(missing)
    assert waited < 10 * TIMEOUT_S
