"""A whole run in process: the same for any W, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhe_dist.checkpoint import CheckpointStore
from mhe_dist.config import Config
from mhe_dist.topology import Topology
from mhe_dist.tracking import read_records
from pipelines import pretrain
from pipelines.bad_samples import FILE
from pipelines.shards import ShardIndex
from pipelines.stream import Loader
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
    found = CheckpointStore(f"{config.run.path}/checkpoints", Topology(), 2).newest()
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


def test_bad_samples_are_counted_over_ranks_and_resumes(run_distributed, tmp_path: Path) -> None:
    index = ShardIndex.load(tiny.write_shards(tmp_path / "train"))
    damaged = [(0, 3), (1, 50), (2, 7)]  # shard, sample
    for shard, inside in damaged:
        with open(index.url(shard), "r+b") as tar:
            tar.seek(int(index.shards[shard].offsets[inside]) + 600)
            tar.write(b"\0" * 200)
    config = tiny.config(
        *(tmp_path, index.folder),
        data={"max_bad_fraction": 1.0},
        train={"max_steps": 12},
        checkpoint={"every_steps": 5},
    )
    assert run(run_distributed, config, 1, stop_at=9) == [False]
    assert run(run_distributed, config, 2) == [True, True]

    def draws(steps: int) -> int:
        loader = Loader(index, config, range(4), 0, steps)
        list(loader)
        return loader.faults.count

    folder = Path(config.run.path)
    records = read_records(folder / "metrics.jsonl")
    # 360 images, 64 a step: steps 6 and 12 complete an epoch.
    counts = {r["step"] + 1: r["bad_samples"] for r in records if "bad_samples" in r}
    assert counts == {6: draws(6), 12: draws(12)}
    assert 0 < draws(5) < counts[12]  # the checkpoint has some, and the resumed run has more
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == counts[12]
    named = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert sorted(line["place"] for line in named) == [index.place(*at) for at in damaged]
    assert all(".jpg: " in line["reason"] for line in named)
