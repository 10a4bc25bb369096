"""What one rank alone cannot read in mid-training fails on all ranks, which go on together."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mhe_dist.config.data import DataConfig
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.evaluate import in_training
from pipelines.evaluate.in_training import TrainedHead, evaluate_in_training
from pipelines.shards.index import ShardIndex
from tests.distributed.test_heldout import CLASSES, SIDE, Embed, write_set

EVALUATIONS = ("shards", "verification", "classification", "labels")


def settings_of(evaluation: str, folder: str) -> EvaluateConfig:
    values: dict[str, Any] = {evaluation: folder}
    if evaluation == "verification":
        values = {evaluation: [f"{folder}/pairs.bin"]}
    if evaluation == "labels":
        values["label_set"] = f"{folder}/labels"
    return EvaluateConfig.model_validate(values)


def heard(topology: Topology, folder: str) -> list[str]:
    """What this rank hears of each evaluation when rank 1 alone cannot read what it needs."""
    head = build_head(HeadSpec(HeadConfig(kind="full", groups=2), CLASSES, 12, 0, 6), topology)
    trained = TrainedHead(head, ShardIndex.load(folder))
    data, messages = DataConfig(shards=folder, image_size=SIDE), []
    broken = OSError(5, "Input/output error")
    for evaluation in EVALUATIONS:
        settings = settings_of(evaluation, folder)
        with (
            mock.patch.object(in_training, "read_bin_sets", return_value=[]) as bins,
            mock.patch.object(in_training, "open_evaluated_labels"),
            mock.patch.object(ShardIndex, "load", wraps=ShardIndex.load) as load,
            pytest.raises((RunError, OSError)) as caught,
        ):
            if topology.rank == 1:
                bins.side_effect = load.side_effect = broken
            evaluate_in_training(Embed(), settings, data, 0, topology, trained)
        messages.append(f"{evaluation}: {caught.type.__name__}: {caught.value}")
    return messages


def test_a_set_that_one_rank_cannot_read_fails_on_all(run_distributed: Any, tmp_path: Path) -> None:
    """That rank alone trained on, and the others waited for it until the run was called stuck."""
    folder = str(tmp_path / "set")
    write_set(folder)
    said = "RunError: OSError: [Errno 5] Input/output error"
    expected = [f"{name}: {said}" for name in EVALUATIONS]
    assert run_distributed(heard, 2, folder) == [expected, expected]
