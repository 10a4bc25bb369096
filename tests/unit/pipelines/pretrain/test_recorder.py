"""The share of doubted labels: over how many steps, and when it is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine import settings
from mhe_dist.tracking.base import NullTracker
from mhe_dist.train.loop import StepInfo
from mhe_dist.train.stopwatch import Stopwatch
from pipelines.pretrain.recorder import DoubtWindow, Recorder, doubtful_settings, ignore_event


class Notes(NullTracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, Any]] = {}

    def log(self, step: int, metrics: Any) -> None:
        self.logged.setdefault(step, {}).update(metrics)


def record(accuracies: list[float], log_every: int, audit_every: int) -> dict[int, dict[str, Any]]:
    topology, notes = Topology(), Notes()
    recorder = Recorder(topology, notes, ignore_event, Stopwatch(topology.device), audit_every)
    for step, accuracy in enumerate(accuracies):
        metrics = {"loss": torch.tensor(1.0), "accuracy": torch.tensor(accuracy)}
        recorder.add_step(StepInfo(step, 0.1, metrics, "0" * 12, 8, 0.0))
        if (step + 1) % log_every == 0 or step + 1 == len(accuracies):
            recorder.flush()
    return notes.logged


def test_doubted_is_the_mean_share_over_the_steps_since_the_last_record() -> None:
    logged = record([0.0, 0.5, 1.0, 0.5, 0.75, 0.25], log_every=1, audit_every=3)
    doubted = {step: values["doubted"] for step, values in logged.items() if "doubted" in values}
    assert doubted == {2: pytest.approx(0.5), 5: pytest.approx(0.5)}


def test_it_waits_for_the_end_of_a_window_of_the_log() -> None:
    logged = record([0.0] * 4 + [1.0] * 4 + [0.5], log_every=4, audit_every=3)
    doubted = {step: values["doubted"] for step, values in logged.items() if "doubted" in values}
    assert doubted == {3: 1.0, 7: 0.0, 8: 0.5}


def test_a_resumed_run_records_at_the_same_steps() -> None:
    window = DoubtWindow(10)
    assert window.add([7, 8], 0.5) == {}
    assert window.add([9, 10], 0.0) == {"doubted": 0.75}


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    assert "doubted" not in record([0.5], log_every=1, audit_every=0)[0]


def test_what_is_told_has_no_secrets() -> None:
    events: list[dict[str, Any]] = []
    topology = Topology()
    recorder = Recorder(topology, Notes(), events.append, Stopwatch(topology.device))
    recorder.warn(3, "lfw.bin?sig=planted cannot be read")
    recorder.emit("checkpoint", step=4, path="s3://me:planted@bucket/x")
    assert recorder.warnings == ["lfw.bin?sig=*** cannot be read"]
    assert [event["step"] for event in events] == [3, 4]
    assert "planted" not in repr(events)


def test_what_a_run_says_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(classes: int, before: str | None, precision: str) -> list[str]:
        config = Config.model_validate(values)
        return list(doubtful_settings(config, classes, torch.device("cpu"), before, precision))

    supported = False
    monkeypatch.setattr(settings, "_cpu_multiplies_bf16", lambda: supported)
    values = {"data": {"shards": "one"}, "train": {"precision": "bf16"}}
    slow, single = said(1, "bf16", "bf16")
    assert slow.startswith("train.precision=bf16: this CPU has no bf16 instructions")
    assert single.startswith("data.shards=one: there is one class only")
    values["train"] = {"precision": "auto"}
    assert not said(2, None, "float32") and not said(2, "float32", "float32")
    (other,) = said(2, "bf16", "float32")
    assert other.startswith("train.precision=auto: float32 on these workers, bf16 so far; to go on")
    supported = True
    (lacking,) = said(2, None, "float32")
    assert lacking.startswith("train.precision=auto: float32, since a rank has no bf16")
    assert not said(2, "bf16", "bf16")
