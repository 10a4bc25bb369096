"""Event files for TensorBoard: what its own reader finds in them, and what happens without it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from mhe_dist.tracking.base import TrackedDataset, Tracker
from mhe_dist.tracking.factory import open_tracker
from mhe_dist.tracking.tensorboard import TensorBoardTracker
from tests.support.faults import disk_full


@pytest.fixture
def installed() -> None:
    pytest.importorskip("tensorboard")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def read_as_server(folder: Path) -> Any:
    from tensorboard.backend.event_processing import plugin_event_accumulator

    return plugin_event_accumulator.EventAccumulator(str(folder)).Reload()


def texts(found: Any, tag: str) -> str:
    (event,) = found.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.mark.usefixtures("installed")
def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    first, second = (TensorBoardTracker(str(tmp_path / "events")) for _ in range(2))
    assert isinstance(first, Tracker)
    first.start({}, {})
    for step in range(6):
        first.log(step, {"loss": 1.0, "heldout/rank1": 0.5})
    first.close("failed")
    second.start({}, {}, step=4)
    for step in (4, 5):
        second.log(step, {"loss": 2.0})
    second.close()
    values = [(event.step, event.value) for event in read(tmp_path / "events").Scalars("loss")]
    assert values == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("step", [0, 2])
def test_what_a_killed_run_does_again_is_one_curve(tmp_path: Path, step: int) -> None:
    """Also without a checkpoint, and in TensorBoard's server, which ignores the first purge."""
    for value, begin in ((1.0, 0), (2.0, step)):
        tracker = TensorBoardTracker(str(tmp_path))
        tracker.start({}, {}, begin)
        for number in range(begin, 3):
            tracker.log(number, {"loss": value})
        tracker.close("failed")
    expected = [(number, 2.0 if number >= step else 1.0) for number in range(3)]
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("loss")] == expected
    served = [event.step for event in read_as_server(tmp_path).Tensors("loss")]
    assert served == [0, 1, 2]


@pytest.mark.usefixtures("installed")
def test_settings_data_and_the_note_are_texts_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "abc123xyz")
    tracker = TensorBoardTracker(str(tmp_path))
    uri = "http://me:secret@host"
    tracker.start({"run": {"name": "r"}, "tracking": {"uri": uri}}, {"tag": "abc123xyz"})
    tracker.dataset(TrackedDataset("faces", "training", "sha256:12", "data/faces", 1200, 30))
    tracker.note("rank-1 **86 %**\n\n![overview](plots/overview.png)")
    tracker.close()
    found = read(tmp_path)
    config = texts(found, "config")
    assert "| run.name | r |" in config
    assert "secret" not in config and "abc123xyz" not in config
    assert texts(found, "data/training") == "1,200 images of 30 classes, sha256:12"
    assert texts(found, "note") == "rank-1 **86 %**"


@pytest.mark.usefixtures("installed")
def test_the_config_asks_for_it(tmp_path: Path) -> None:
    values = {"data": {"shards": "x"}, "run": {"name": "r", "dir": str(tmp_path)}}
    config = Config.model_validate(values | {"tracking": {"mlflow": False, "tensorboard": True}})
    tracker = open_tracker(config, is_first=True)
    tracker.start({}, {})
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert read(tmp_path / "r" / "tensorboard").Scalars("loss")
    assert (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("installed")
def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path: Path) -> None:
    class Full:
        add_scalar = disk_full

    tracker = TensorBoardTracker(str(tmp_path))
    tracker._writer = Full()  # type: ignore[assignment]
    assert not tracker.problem
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert "No space left" in tracker.problem and str(tmp_path) in tracker.problem


def test_without_the_library_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'mhe\[tensorboard\]'"):
        TensorBoardTracker(str(tmp_path))


def test_a_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/r/tensorboard is a URL"):
        TensorBoardTracker("s3://bucket/r/tensorboard")
