"""A whole run in process: the same for any W, and after a resume."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology, disconnect
from mhe_dist.engine.engine import Engine
from mhe_dist.errors import Preempted, UserError
from mhe_dist.tracking.jsonl import read_records
from mhe_dist.train.divergence import Diverged
from pipelines.data.bad_samples import BAD_SAMPLES_FILE
from pipelines.pretrain import finish, preemption
from pipelines.pretrain.exclusive import run_locked
from pipelines.pretrain.main import run_pretraining
from pipelines.pretrain.run import Run
from pipelines.runs import lock
from pipelines.runs.lock import FileLock, Holder
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.label_sets import write_labels
from tests.support.data.loading import loader_of

STEPS = 18  # of most runs here: a checkpoint after 10, and what happens to them in step 13 or 14


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "train")


class Stopped(Exception):
    """What ends a run half-way in these tests."""


def run_rank(topology: Topology, config: dict, stop_at: int) -> bool:
    """One rank of a run; with `stop_at`, it dies when the first rank's record reaches that step."""

    def on_event(event: dict) -> None:
        if event["event"] == "metrics" and 0 < stop_at <= event["step"]:
            raise Stopped

    try:
        run_pretraining(Config.model_validate(config), on_event)
    except Stopped:
        return False
    return True


def run(run_distributed, config: Config, world_size: int, stop_at: int = 0) -> list[bool]:
    values = config.model_dump()
    values["scale"]["workers"] = world_size
    return run_distributed(run_rank, world_size, values, stop_at)


@pytest.fixture(scope="module")
def uninterrupted(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    from tests.conftest import run_ranks

    whole = {"run": {"name": "whole"}, "train": {"max_steps": STEPS}}
    config = tiny.config(tmp_path_factory.mktemp("runs"), shards, **whole)
    assert run(run_ranks, config, 1) == [True]
    return config


def test_it_learns(uninterrupted: Config) -> None:
    losses, _ = tiny.per_step(uninterrupted)
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("world_size", [2, 4])
def test_more_ranks_are_the_same_run(
    run_distributed, uninterrupted: Config, tmp_path: Path, world_size: int
) -> None:
    config = uninterrupted.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    assert all(run(run_distributed, config, world_size))
    losses, digests = tiny.per_step(config)
    wanted, wanted_digests = tiny.per_step(uninterrupted)
    assert digests == wanted_digests
    assert losses == pytest.approx(wanted, rel=1e-6), "rounding of the reported mean"
    assert tiny.differing(config, uninterrupted) == []


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_resumed_run_is_the_same_run(
    run_distributed, uninterrupted: Config, tmp_path: Path, loader_workers: int
) -> None:
    config = uninterrupted.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    config.data.loader_workers = loader_workers
    assert run(run_distributed, config, 1, stop_at=14) == [False]
    assert run(run_distributed, config, 1) == [True]
    assert tiny.per_step(config) == tiny.per_step(uninterrupted)
    assert tiny.differing(config, uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "world_sizes"),
    [
        ({"kind": "full", "objective": "multi_label"}, (1,)),
        ({"kind": "mhs", "objective": "multi_label"}, (1, 2)),
        ({"kind": "mhc", "objective": "multi_label", "margin": {"kind": "none"}}, (1,)),
    ],
    ids=["full", "mhs", "mhc"],
)
def test_several_labels_per_image_are_learnt(
    run_distributed, shards: str, tmp_path: Path, head: dict, world_sizes: tuple[int, ...]
) -> None:
    index = ShardIndex.load(shards)
    own = [int(label) for shard in index.shards for label in shard.labels]
    lists = [[label, 30 + label % 5, 35 + label % 3] if label else [] for label in own]
    labels = write_labels(f"{tmp_path}/labels", index, lists, 38).folder
    found = []
    for world_size in world_sizes:
        config = tiny.config(
            tmp_path / str(world_size),
            shards,
            data={"labels": labels, "labels_per_sample": 2},
            head=head | {"groups": 4},
            train={"max_steps": 12},
            optim={"lr": 0.05, "warmup_steps": 4},
            checkpoint={"every_steps": 0},
        )
        assert all(run(run_distributed, config, world_size))
        found.append(tiny.per_step(config))
    (losses, digests), (other, other_digests) = found[0], found[-1]
    assert digests == other_digests
    assert other[:4] == pytest.approx(losses[:4], rel=1e-4), "rounding; later it grows"
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def run_beside_a_gpu(topology: Topology, config: dict) -> bool:
    """One rank of a run on the CPU, on a machine with one GPU; alone it makes its own group."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    if topology.world_size == 1:
        disconnect()
    return run_rank(topology, config, stop_at=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gpu_that_the_config_does_not_ask_for_is_left_alone(
    run_distributed, uninterrupted: Config, tmp_path: Path, world_size: int
) -> None:
    config = uninterrupted.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    values = config.model_dump()
    values["train"]["max_steps"], values["scale"]["workers"] = 2, world_size
    assert run_distributed(run_beside_a_gpu, world_size, values) == [True] * world_size
    assert tiny.per_step(config)[1] == tiny.per_step(uninterrupted)[1][:2]


CALLED = {
    "starting": (Run, "__init__"),
    "training": (Run, "train"),
    "evaluating": (Engine, "embed"),
    "exporting": (finish, "write_format"),
}


def run_preempted(topology: Topology, config: dict, phase: str = "training") -> str:
    """The last rank, or the only one that does it, is told to stop when a phase begins."""
    owner: Any
    owner, name = CALLED[phase]
    function = getattr(owner, name)

    def after_signal(*arguments: Any) -> Any:
        if topology.rank == topology.world_size - 1 or phase == "exporting":
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    preemption.listen_for_sigterm()
    setattr(owner, name, after_signal)
    try:
        run_pretraining(Config.model_validate(config))
    except Preempted as stop:
        return str(stop)
    finally:
        setattr(owner, name, function)
    return ""


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_that_is_told_while_it_starts_evaluates_or_exports_loses_nothing(
    run_distributed, shards: str, tmp_path: Path, world_size: int
) -> None:
    heldout = tiny.write_shards(tmp_path / "heldout", classes=25, first=1000)
    config, other = (
        tiny.config(
            tmp_path,
            shards,
            run={"name": name},
            train={"max_steps": 6},
            evaluate={"shards": heldout, "pairs": 100, "every_steps": 4},
            scale={"workers": world_size},
            export={"formats": ["timm"]},
        )
        for name in ("stopped", "undisturbed")
    )
    expected = [
        ("starting", "before its first step; there was nothing to save"),
        ("evaluating", "after step 4; everything is saved"),
        ("evaluating", "while it evaluated; the checkpoint of step 4 stands"),  # begun anew
        ("exporting", "while it exported; the checkpoint of step 6 stands"),
    ]
    for phase, message in expected:
        messages = run_distributed(run_preempted, world_size, config.model_dump(), phase)
        assert messages == [f"told to stop {message}"] * world_size
    for each in (config, other):
        assert run(run_distributed, each, world_size) == [True] * world_size
    assert tiny.per_step(config) == tiny.per_step(other)
    assert tiny.differing(config, other) == []
    ours, theirs = (read_records(f"{each.run.path}/metrics.jsonl") for each in (config, other))
    found = [
        [(r["step"], r["heldout/rank1"]) for r in e if "heldout/rank1" in r] for e in (ours, theirs)
    ]
    assert found[0] == found[1] and [step for step, _ in found[0]] == [3, 5]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_preempted_run_saves_at_once_and_goes_on_from_there(
    run_distributed, uninterrupted: Config, tmp_path: Path, world_size: int
) -> None:
    """Whichever rank gets the signal, all stop after the same step, which no interval divides."""
    config = uninterrupted.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    values = config.model_dump()
    values["scale"]["workers"] = world_size
    messages = run_distributed(run_preempted, world_size, values)
    assert messages == ["told to stop after step 1; everything is saved"] * world_size
    found = CheckpointStore(f"{config.run.path}/checkpoints", Topology()).newest()
    assert found is not None and found.step == 1
    assert run(run_distributed, config, 1) == [True]
    assert tiny.per_step(config)[1] == tiny.per_step(uninterrupted)[1]
    if world_size == 1:
        assert tiny.per_step(config) == tiny.per_step(uninterrupted)


def run_several_times(topology: Topology, first: dict, second: dict) -> dict[str, list]:
    """Runs one after the other in one process without a process group, as in a notebook.

    The second one is asked to stop before it begins and while it goes on, and is then called again.
    """
    disconnect()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    found: dict[str, list] = {}
    preemption.listen_for_sigterm()
    summaries = [run_pretraining(Config.model_validate(first))]
    os.kill(os.getpid(), signal.SIGTERM)
    for on_event in (print, lambda event: preemption.request()):
        try:
            run_pretraining(Config.model_validate(second), on_event)
        except Preempted as stop:
            found.setdefault("preempted", []).append(str(stop))
    summaries.append(run_pretraining(Config.model_validate(second)))
    found["steps"] = [summary["steps"] for summary in summaries]
    found["resumed_from"] = [summary["resumed_from"] for summary in summaries]
    found["connected"] = [torch.distributed.is_initialized()]
    return found


def test_one_process_runs_several_times_and_a_request_stops_one_run_only(
    run_distributed, shards: str, tmp_path: Path
) -> None:
    first, second = (
        tiny.config(tmp_path, shards, run={"name": name}, train={"max_steps": 6})
        for name in ("first", "second")
    )
    (found,) = run_distributed(run_several_times, 1, first.model_dump(), second.model_dump())
    assert found["preempted"] == [
        "told to stop before its first step; there was nothing to save",
        "told to stop after step 1; everything is saved",
    ]
    assert found["steps"] == [6, 6]
    assert found["resumed_from"] == [None, f"{second.run.path}/checkpoints/step_00000001"]
    assert found["connected"] == [False]
    assert tiny.per_step(first) == tiny.per_step(second)
    assert tiny.differing(first, second) == []


def run_with_a_poisoned_step(topology: Topology, config: dict) -> list[dict]:
    """Step 13 makes the network's output infinite, whenever it is trained on."""
    forward = Engine.forward

    def poisoned(engine: Engine, images: torch.Tensor, step: int, part: int) -> torch.Tensor:
        embeddings = forward(engine, images, step, part)
        return embeddings * float("inf") if step == 13 and part == 0 else embeddings

    Engine.forward = poisoned
    events: list[dict] = []
    try:
        run_pretraining(Config.model_validate(config), events.append)
    except Diverged as stop:
        events.append({"event": "stopped", "message": str(stop)})
    kinds = ("start", "diverged", "stopped", "end")
    keys = ("event", "step", "message", "bundle")
    return [{k: v for k, v in e.items() if k in keys} for e in events if e["event"] in kinds]


@pytest.mark.parametrize(("policy", "world_size"), [("rollback", 2), ("stop", 1)])
def test_divergence_leaves_a_bundle_and_stops_or_goes_back(
    run_distributed, uninterrupted: Config, tmp_path: Path, policy: str, world_size: int
) -> None:
    config = uninterrupted.model_copy(deep=True)
    config.run.dir = str(tmp_path)
    config.guard.on_divergence = policy  # type: ignore[assignment]
    values = config.model_dump()
    values["scale"]["workers"] = world_size
    events = run_distributed(run_with_a_poisoned_step, world_size, values)[0]
    bundle = Path(config.run.path) / "divergence" / "step_00000013"
    diverged = {"event": "diverged", "step": 13, "bundle": str(bundle)}
    assert events[:2] == [{"event": "start", "step": 0}, diverged]
    report = json.loads((bundle / "report.json").read_text())
    assert report["step"] == 13
    assert any(name.endswith("conv1.weight") for name in report["norms"])
    batches = [np.load(bundle / f"micro_batch_{i:05d}.npz") for i in range(4)]
    assert all(b["images"].shape == (16, 3, tiny.SIDE, tiny.SIDE) for b in batches)
    assert len({key for b in batches for key in b["keys"].tolist()}) == 64
    if policy == "stop":
        assert "step 13: the loss is nan" in events[2]["message"]
        return
    assert events[2:] == [{"event": "start", "step": 10}, {"event": "end"}]
    records = read_records(f"{config.run.path}/metrics.jsonl")
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert sorted(losses) == [step for step in range(STEPS) if step not in (12, 13)]
    wanted, _ = tiny.per_step(uninterrupted)
    assert [losses[step] for step in range(10)] == pytest.approx(wanted[:10], rel=1e-4)
    assert all(math.isfinite(loss) for loss in losses.values())
    (restart,) = [r for r in records if "restarts" in r]
    assert (restart["restarts"], restart["restart_lost_steps"]) == (1, 5)


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
        loader = loader_of(index, config, range(4), 0, steps)
        list(loader)
        return loader.faults.count

    folder = Path(config.run.path)
    records = read_records(folder / "metrics.jsonl")
    # 360 images, 64 a step: steps 6 and 12 complete an epoch.
    counts = {r["step"] + 1: r["bad_samples"] for r in records if "bad_samples" in r}
    assert counts == {6: draws(6), 12: draws(12)}
    assert 0 < draws(5) < counts[12]  # the checkpoint has some, and the resumed run has more
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == counts[12]
    named = [json.loads(line) for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()]
    assert sorted(line["place"] for line in named) == [index.sample_name(*at) for at in damaged]
    assert all(".jpg: " in line["reason"] for line in named)


def try_to_train(topology: Topology, path: str) -> str:
    lock.WAIT_S = 0.2
    try:
        with run_locked(path, topology, "", print):
            return "trains"
    except UserError as error:
        return str(error)


def test_all_ranks_are_refused_in_the_same_words(tmp_path: Path, run_distributed) -> None:
    other = Holder(host="other-host", pid=4242)
    first = FileLock(str(tmp_path), other)
    first.acquire(lambda: False)
    words = run_distributed(try_to_train, 2, str(tmp_path))
    assert f"is being trained by {other}" in words[0] and words[0] == words[1]
    first.release()
    assert run_distributed(try_to_train, 2, str(tmp_path)) == ["trains", "trains"]
