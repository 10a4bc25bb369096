"""Rollbacks come to an end, whatever step diverges."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from mhe_dist.config.schema import GuardConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.train.divergence import Diverged, Divergence
from pipelines.pretrain import rollback


def a_run(folder: Path) -> Any:
    """What a rollback asks of a run; a checkpoint is always older."""
    guard = GuardConfig(on_divergence="rollback", max_rollbacks=3)
    config = SimpleNamespace(guard=guard, run=SimpleNamespace(path=str(folder)))
    return mock.Mock(
        config=config, topology=Topology(), **{"store.roll_back_to.return_value": True}
    )


def test_a_last_step_that_always_diverges_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never left out, so that each attempt went back from it as the one before, for ever."""
    monkeypatch.setattr(rollback, "_write_bundle", lambda *_: "divergence/step_00000099")
    divergence = Divergence(99, "the loss is nan")
    rollback.roll_back(a_run(tmp_path), divergence)
    assert json.loads((tmp_path / "skipped.json").read_text()) == [98, 99]
    with pytest.raises(Diverged, match="It is the last step, which no run leaves out"):
        rollback.roll_back(a_run(tmp_path), divergence)


def test_as_many_rollbacks_as_the_guard_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "_write_bundle", lambda *_: "divergence")
    for step in (10, 20, 30):
        rollback.roll_back(a_run(tmp_path), Divergence(step, "the loss is nan"))
    with pytest.raises(Diverged, match=r"went back guard\.max_rollbacks=3 times"):
        rollback.roll_back(a_run(tmp_path), Divergence(40, "the loss is nan"))
