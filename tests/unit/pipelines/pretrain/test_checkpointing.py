"""When a run saves, and what it says of saves that went well or did not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhe_dist.checkpoint.store import CheckpointStore, CheckpointWarning
from mhe_dist.config.schema import CheckpointConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.tracking.base import NullTracker
from mhe_dist.train.stopwatch import Stopwatch
from pipelines.pretrain.checkpointing import Checkpointer
from pipelines.pretrain.recorder import Recorder


class Notes(NullTracker):
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: Any) -> None:
        self.logged.append((step, dict(metrics)))


class Scene:
    """A checkpointer, and everything that it reports."""

    def __init__(self, root: Path, **config: Any) -> None:
        topology = Topology()
        self.events: list[dict[str, Any]] = []
        self.now, self.notes = 0.0, Notes()
        recorder = Recorder(topology, self.notes, self.events.append, Stopwatch(topology.device))
        store = CheckpointStore(str(root), topology)
        self.checkpointer = Checkpointer(
            CheckpointConfig(**config), store, recorder, lambda: self.now
        )

    def save(self, step: int) -> None:
        self.checkpointer.save(step, {"weight": torch.ones(3)}, {}, {})


def test_a_checkpoint_is_told_of_when_it_is_complete_not_when_it_is_begun(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.save(7)
    assert scene.events == []
    scene.checkpointer.wait()
    (event,) = scene.events
    assert (event["event"], event["step"]) == ("checkpoint", 7)
    assert (Path(event["path"]) / "manifest.json").exists()
    assert event["bytes"] == sum(
        f.stat().st_size for f in Path(event["path"]).iterdir() if f.name != "manifest.json"
    )
    ((step, figures),) = scene.notes.logged
    assert step == 6
    assert figures["checkpoint_bytes"] == event["bytes"]
    assert scene.checkpointer.status == "everything is saved"


def test_a_failed_save_is_told_everywhere_and_the_next_one_is_made(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "root")
    (tmp_path / "root").write_text("a file where the folder should be")
    scene.save(1)
    with pytest.warns(CheckpointWarning):
        scene.checkpointer.wait()
    assert scene.events[0]["event"] == "checkpoint_failed"
    assert scene.notes.logged == [(0, {"checkpoint_failures": 1.0})]
    assert scene.checkpointer.failures[0].startswith("step 1: ")
    assert "last good checkpoint stands" in scene.checkpointer.status
    (tmp_path / "root").unlink()
    scene.save(2)
    scene.checkpointer.wait()
    assert [event["event"] for event in scene.events] == ["checkpoint_failed", "checkpoint"]


def test_minutes_count_from_the_last_save(tmp_path: Path) -> None:
    scene = Scene(tmp_path, every_minutes=2)
    scene.now = 119
    assert not scene.checkpointer.overdue()
    scene.now = 120
    assert scene.checkpointer.overdue()
    scene.save(1)
    assert not scene.checkpointer.overdue()
    scene.checkpointer.wait()


def test_no_minutes_no_clock(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.now = 1e9
    assert not scene.checkpointer.overdue()


@pytest.mark.parametrize(
    ("config", "step", "evaluated", "due"),
    [
        ({"every_steps": 5}, 10, False, True),
        ({"every_steps": 5}, 11, True, False),
        ({"every_steps": 0}, 10, True, False),
        ({"every_steps": 0, "keep_best": "rank1"}, 10, True, True),
        ({"every_steps": 0, "keep_best": "rank1"}, 10, False, False),
    ],
)
def test_steps_and_scored_steps_are_due(
    tmp_path: Path, config: dict[str, Any], step: int, evaluated: bool, due: bool
) -> None:
    assert Scene(tmp_path, **config).checkpointer.due(step, evaluated) is due
