"""A whole run in process: the same for any W, and after a resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from mhe_dist.checkpoint import CheckpointStore
from mhe_dist.config import Config
from mhe_dist.errors import Preempted
from mhe_dist.topology import Topology
from pipelines import pretrain, stopping
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "train")


class Stopped(Exception):
    """What ends a run half-way in these tests."""


def run_rank(place: Topology, config: dict, stop_at: int) -> bool:
    """One rank of a run; with `stop_at`, it dies when the first rank's record reaches that step."""

    def report(event: dict) -> None:
        if event["event"] == "metrics" and 0 < stop_at <= event["step"]:
            raise Stopped

    try:
        pretrain.main(Config.model_validate(config), report)
    except Stopped:
        return False
    return True


def run(run_distributed, config: Config, world_size: int, stop_at: int = 0) -> list[bool]:
    values = config.model_dump()
    values["scale"]["workers"] = world_size
    return run_distributed(run_rank, world_size, values, stop_at)


def state(config: Config) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run."""
    found = CheckpointStore(f"{config.run.path}/checkpoints", Topology()).newest()
    assert found is not None and found.run["step"] == config.train.max_steps
    return found.load(lambda name: True)


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    from tests.conftest import run_ranks

    config = tiny.config(tmp_path_factory.mktemp("runs"), shards, run={"name": "whole"})
    assert run(run_ranks, config, 1) == [True]
    return config


def test_it_learns(undisturbed: Config) -> None:
    losses, _ = tiny.per_step(undisturbed)
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# What rounding changes grows from step to step; with four ranks it is above 1e-4 at step 19.
@pytest.mark.parametrize(("world_size", "compared"), [(2, 20), (4, 10)])
def test_more_ranks_see_the_same_batches_and_losses(
    run_distributed, undisturbed: Config, tmp_path: Path, world_size: int, compared: int
) -> None:
    config = undisturbed.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    assert all(run(run_distributed, config, world_size))
    losses, digests = tiny.per_step(config)
    wanted, wanted_digests = tiny.per_step(undisturbed)
    assert digests == wanted_digests
    assert losses[:compared] == pytest.approx(wanted[:compared], rel=1e-4)


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_resumed_run_is_the_same_run(
    run_distributed, undisturbed: Config, tmp_path: Path, loader_workers: int
) -> None:
    config = undisturbed.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    config.data.loader_workers = loader_workers
    assert run(run_distributed, config, 1, stop_at=14) == [False]
    assert run(run_distributed, config, 1) == [True]
    assert tiny.per_step(config) == tiny.per_step(undisturbed)
    resumed, whole = state(config), state(undisturbed)
    assert resumed.keys() == whole.keys()
    different = [name for name in whole if not torch.equal(resumed[name], whole[name])]
    assert different == []


def run_preempted(place: Topology, config: dict) -> str:
    """The last rank is told to stop while the first window of steps is trained."""

    def report(event: dict) -> None:
        if event["event"] == "start":
            os.kill(os.getpid(), signal.SIGTERM)

    stopping.listen()
    if place.rank == place.world_size - 1 > 0:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        pretrain.main(Config.model_validate(config), report if place.world_size == 1 else print)
    except Preempted as stop:
        return str(stop)
    return ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_preempted_run_saves_at_once_and_goes_on_from_there(
    run_distributed, undisturbed: Config, tmp_path: Path, world_size: int
) -> None:
    """Whichever rank gets the signal, all stop after the same step, which no interval divides."""
    config = undisturbed.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    values = config.model_dump()
    values["scale"]["workers"] = world_size
    said = run_distributed(run_preempted, world_size, values)
    assert said == ["told to stop after step 1; everything is saved"] * world_size
    found = CheckpointStore(f"{config.run.path}/checkpoints", Topology()).newest()
    assert found is not None and found.step == 1
    assert run(run_distributed, config, 1) == [True]
    assert tiny.per_step(config)[1] == tiny.per_step(undisturbed)[1]
    if world_size == 1:
        assert tiny.per_step(config) == tiny.per_step(undisturbed)
