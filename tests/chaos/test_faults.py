"""Faults at random moments of a run; whatever happened, the run ends as if nothing had.

`make test` has a few of them, `make chaos` many. The seed is printed; `MHE_CHAOS_SEED` repeats it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.errors import Preempted
from pipelines.pretrain import preemption
from pipelines.pretrain.main import run_pretraining
from tests.conftest import run_ranks
from tests.golden.record import train as train_uninterrupted
from tests.support import tiny
from tests.support.rank_processes import environment, free_port
from tests.support.waiting import WATCHDOG_S, stretched

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

FAULTS = int(os.environ.get("MHE_CHAOS_FAULTS", "4"))
SEED = int(os.environ.get("MHE_CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))
RANKS, STEPS_PER_FAULT, SAVE_EVERY = 2, 8, 4
# Of the ranks for each other: more than a busy machine makes one of them wait.
TIMEOUT_S = max(12.0, stretched(4.0))
DISK_BYTES = 250_000  # less than a checkpoint's largest file; metrics of a hundred faults fit


def train(rank: int, port: int, config: dict[str, Any], sender: Any, disk: int) -> None:
    """One rank; it tells its events and how it ended."""
    environment(rank, RANKS, port)
    preemption.listen_for_sigterm()
    if disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    try:
        run_pretraining(Config.model_validate(config), sender.send)
    except Preempted:
        sender.send({"event": "preempted"})
        os._exit(Preempted.exit_code)
    sender.send({"event": "done"})


class Attempt:
    """The processes of one start of the run."""

    def __init__(self, config: Config, disk: int = 0) -> None:
        context, port = multiprocessing.get_context("forkserver"), free_port()
        self.ours, theirs = context.Pipe()
        self._unheard, silent = context.Pipe()  # what other ranks say
        values = config.model_dump()
        self.ranks = [
            context.Process(target=train, args=(r, port, values, silent if r else theirs, disk))
            for r in range(RANKS)
        ]
        for process in self.ranks:
            process.start()
        theirs.close()

    def until(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event of rank 0 for which `true` holds, or `{}` when there will be none."""
        try:
            while self.ours.poll(WATCHDOG_S):
                if true(event := self.ours.recv()):
                    return event
        except EOFError:
            return {}
        pytest.fail("the run hangs")

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def end(self) -> None:
        """What a launcher does when a rank failed."""
        for process in self.ranks:
            process.kill()
            process.join()


def killed(run: Attempt, draw: random.Random, folder: Path) -> None:
    """A rank is killed at any moment."""
    time.sleep(draw.random() * 0.3)
    run.signal(signal.SIGKILL, draw.randrange(RANKS))


def killed_in_a_save(run: Attempt, draw: random.Random, folder: Path) -> None:
    """All ranks are killed while a checkpoint is half-written, or at least soon."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if any(not (step / "manifest.json").exists() for step in folder.glob("step_*")):
            break
    run.signal(signal.SIGKILL, *range(RANKS))


def preempted(run: Attempt, draw: random.Random, folder: Path) -> None:
    """One rank gets SIGTERM; all leave in order."""
    run.signal(signal.SIGTERM, draw.randrange(RANKS))
    run.until(lambda event: event["event"] in ("preempted", "done"))
    for process in run.ranks:
        process.join(WATCHDOG_S)
        assert process.exitcode in (0, Preempted.exit_code)


def stopped(run: Attempt, draw: random.Random, folder: Path) -> None:
    """A rank stops for longer than the timeout."""
    rank = draw.randrange(RANKS)
    run.signal(signal.SIGSTOP, rank)
    run.ranks[1 - rank].join(WATCHDOG_S)
    assert run.ranks[1 - rank].exitcode is not None


def truncated(run: Attempt, draw: random.Random, folder: Path) -> None:
    """The newest checkpoint loses the end of a file."""
    run.end()
    file = draw.choice(sorted(newest(folder).iterdir()))
    os.truncate(file, file.stat().st_size // 2)


def removed(run: Attempt, draw: random.Random, folder: Path) -> None:
    """The newest checkpoint loses a file."""
    run.end()
    draw.choice(sorted(newest(folder).iterdir())).unlink()


def full(run: Attempt, draw: random.Random, folder: Path) -> None:
    """Every save of this attempt has failed, loudly, and training went on."""
    assert run.until(lambda event: event["event"] in ("checkpoint_failed", "done"))


FAULT_KINDS = [killed, killed_in_a_save, preempted, stopped, truncated, removed, full]


def is_due(at_start: bool, step: int, event: dict[str, Any]) -> bool:
    """Whether it is time for a fault."""
    if at_start:
        return event["event"] == "start"
    return event["event"] == "checkpoint" and event["step"] >= step


def newest(folder: Path) -> Path:
    return max(step for step in folder.glob("step_*") if (step / "manifest.json").exists())


def test_nothing_is_lost(tmp_path: Path) -> None:
    print(f"\nMHE_CHAOS_SEED={SEED} MHE_CHAOS_FAULTS={FAULTS}")
    draw = random.Random(SEED)
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "shards"),
        run={"name": "disturbed"},
        train={
            "max_steps": STEPS_PER_FAULT * (FAULTS + 1),
            "epochs": 1000,
            "log_every": SAVE_EVERY,
        },
        scale={"workers": RANKS, "timeout_s": TIMEOUT_S},
        checkpoint={"every_steps": SAVE_EVERY},
    )
    folder = Path(config.run.path) / "checkpoints"
    kinds = [FAULT_KINDS[i % len(FAULT_KINDS)] for i in range(FAULTS)]
    draw.shuffle(kinds)
    for number, fault in enumerate(kinds, 1):
        run = Attempt(config, DISK_BYTES if fault is full else 0)
        event = run.until(partial(is_due, fault is full, STEPS_PER_FAULT * number))
        print(f"{fault.__name__} at step {event.get('step')}")
        fault(run, draw, folder)
        run.end()
    last = Attempt(config)
    assert last.until(lambda event: event["event"] == "done"), "it ends by itself"
    for process in last.ranks:
        process.join(WATCHDOG_S)
    assert_uninterrupted(config)


def assert_uninterrupted(config: Config) -> None:
    """Losses of all steps and the final state are those of a run that nothing happened to."""
    uninterrupted = config.model_copy(deep=True)
    uninterrupted.run.name, uninterrupted.scale.timeout_s = "uninterrupted", 60.0
    run_ranks(train_uninterrupted, RANKS, uninterrupted.model_dump())
    assert tiny.per_step(config) == tiny.per_step(uninterrupted)
    assert tiny.differing(config, uninterrupted) == []
