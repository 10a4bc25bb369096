"""What one rank alone cannot read fails on all ranks, which would wait for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from launcher.verbs.embedding import search
from mhe_dist.config.data import DataConfig
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.evaluate import in_training
from pipelines.evaluate.in_training import TrainedHead, evaluate_in_training
from pipelines.runs import trained
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
    said = "StorageUnavailable: OSError: [Errno 5] Input/output error"
    expected = [f"{name}: {said}" for name in EVALUATIONS]
    assert run_distributed(heard, 2, folder) == [expected, expected]


def told_of_gallery(topology: Topology, gallery: str) -> str:
    """What this rank says of a gallery that the first one alone reads."""
    backbone = SimpleNamespace(config=SimpleNamespace(data=DataConfig(shards="", image_size=SIDE)))
    with (
        mock.patch.object(search, "join_ranks", return_value=topology),
        mock.patch.object(trained, "load_trained_backbone", return_value=backbone),
        pytest.raises(UserError) as caught,
    ):
        search.search("run", gallery=gallery, query="photos")
    return str(caught.value)


def test_a_gallery_that_is_refused_fails_on_all(run_distributed: Any, tmp_path: Path) -> None:
    """The other ranks waited for the first one's images of the query."""
    path = tmp_path / "gallery.npz"
    path.write_bytes(b"no file of embeddings")
    first, other = run_distributed(told_of_gallery, 2, str(path))
    assert first == other and str(path) in first
