"""What a run takes over from another, class by class: rows, their state, the backbone."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhe_dist.checkpoint.files import CheckpointFolder
from mhe_dist.checkpoint.store import CheckpointWarning
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.row_head import RowHead
from pipelines.pretrain.main import run_pretraining
from pipelines.pretrain.recorder import ignore_event
from pipelines.pretrain.run import Run
from pipelines.runs.trained import load_trained_backbone
from pipelines.runs.warm_start import find_checkpoint, grow_checkpoint, refuse_other_num_classes
from pipelines.shards.index import ShardIndex
from tests.conftest import run_ranks
from tests.support import tiny

GROWN = 40


def rows_of(head: Any, topology: Topology) -> dict[str, Tensor]:
    """Fields of this rank's classes `[C, D]`, by class; NaN for the classes of other ranks."""
    assert isinstance(head, RowHead)
    units, slots = head.layout.locate(torch.arange(head.spec.num_classes))
    mine = (units >= head.bank.units.start) & (units < head.bank.units.stop)
    head.bank.touch(torch.unique(units[mine]))
    found = {}
    for field, saved in head.bank.saved(units[mine]).items():
        rows = saved.tensor()
        table = torch.full((len(units), rows.shape[-1]), float("nan"), dtype=rows.dtype)
        table[mine] = rows[torch.arange(len(rows)), slots[mine]]
        found[field] = table
    return found


def train(topology: Topology, config: dict[str, Any]) -> None:
    run_pretraining(Config.model_validate(config))


def begin(topology: Topology, config: dict[str, Any]) -> dict[str, Any]:
    """What a run holds before its first step."""
    run = Run(Config.model_validate(config), topology, ignore_event)
    run.tracker.close()
    return {
        "step": run.progress.step,
        "rows": rows_of(run.head, topology),
        "state": run.engine.state(),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of ten steps."""
    folder = tmp_path_factory.mktemp("trained")
    shards = tiny.write_shards(folder / "shards")
    config = tiny.config(folder, shards, train={"max_steps": 10}, run={"name": "old"})
    run_ranks(train, 1, config.model_dump())
    return config


def begun(config: Config, workers: int = 1) -> dict[str, Any]:
    values = config.model_dump()
    values["scale"]["workers"] = workers
    parts = run_ranks(begin, workers, values)
    whole = parts[0]["rows"]
    for part in parts[1:]:
        for field, rows in part["rows"].items():
            whole[field] = torch.where(torch.isnan(whole[field]), rows, whole[field])
    return parts[0]


def test_a_grown_run_goes_on_with_the_old_rows_and_new_ones(
    trained: Config, tmp_path: Path
) -> None:
    old = begun(trained)
    config = trained.model_copy(deep=True)
    config.run.dir, config.run.name = str(tmp_path), "grown"
    checkpoint = find_checkpoint(trained.run.path)
    grow_checkpoint(checkpoint, GROWN, f"{config.run.path}/checkpoints")
    with pytest.raises(UserError, match=r"has 30 classes.*was grown to 40"):
        refuse_other_num_classes(GROWN, ShardIndex.load(trained.data.shards), trained)

    config.data.shards = tiny.write_shards(tmp_path / "shards", GROWN)
    config.train.max_steps = 15
    grown = begun(config, workers=2)
    assert old["step"] == grown["step"] == 10
    for field, rows in old["rows"].items():
        assert torch.equal(grown["rows"][field][: len(rows)], rows), field
        new = grown["rows"][field][len(rows) :]
        assert torch.isfinite(new).all()
        assert new.any() == (field == "weight")
    assert all(torch.equal(grown["state"][name], old["state"][name]) for name in old["state"])
    run_ranks(train, 1, config.model_dump())
    assert find_checkpoint(config.run.path).step == 15


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_new_run_begins_with_another_s_backbone_and_rows(
    trained: Config, tmp_path: Path, with_rows: bool
) -> None:
    old = begun(trained)
    config = trained.model_copy(deep=True)
    config.run.dir, config.run.seed, config.head.groups = str(tmp_path), 99, 3
    config.head.mhs.length = 7
    config.model.init_from = trained.run.path
    config.head.init_from = find_checkpoint(trained.run.path).path if with_rows else ""
    new = begun(config, workers=2)
    assert new["step"] == 0
    for name, tensor in old["state"].items():
        taken = torch.equal(new["state"][name], tensor)
        assert taken if name.startswith("model.") else not new["state"][name].any()
    assert torch.equal(new["rows"]["weight"], old["rows"]["weight"]) is with_rows


def with_momentum(config: Config, momentum: float, steps: int) -> Config:
    """The same run, which goes on with another momentum of backbone and rows."""
    changed = config.model_copy(deep=True)
    changed.optim.momentum = changed.head.optim.momentum = momentum
    changed.train.max_steps = steps
    changed.resume.allow = ["optim.momentum", "head.optim.momentum", "train.max_steps"]
    return changed


def test_a_momentum_from_and_to_zero_changes_what_is_kept_and_nothing_else(
    trained: Config, tmp_path: Path
) -> None:
    """By name it may change; a run without momentum ended in `KeyError: rows/00000/momentum`."""
    old, config = begun(trained), trained.model_copy(deep=True)
    shutil.copytree(trained.run.path, tmp_path / config.run.name)
    config.run.dir = str(tmp_path)
    without = begun(with_momentum(config, 0.0, 12), workers=2)
    assert torch.equal(without["rows"].pop("weight"), old["rows"]["weight"])
    assert not without["rows"]
    assert without["state"].keys() == {name for name in old["state"] if name.startswith("model.")}
    assert all(torch.equal(found, old["state"][name]) for name, found in without["state"].items())

    run_ranks(train, 1, with_momentum(config, 0.0, 12).model_dump())
    ended = begun(with_momentum(config, 0.0, 12))
    again = begun(with_momentum(config, 0.9, 14), workers=2)
    assert torch.equal(again["rows"]["weight"], ended["rows"]["weight"])
    assert not again["rows"]["momentum"].any()
    for name, found in again["state"].items():
        kept = ended["state"].get(name)
        assert torch.equal(found, kept) if kept is not None else not found.any(), name
    assert again["state"].keys() == old["state"].keys()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_are_taken_over_by_a_head_of_another_momentum(
    trained: Config, tmp_path: Path, momentum: float
) -> None:
    first, config = trained.model_copy(deep=True), trained.model_copy(deep=True)
    first.run.dir = str(tmp_path / "first")
    first.head.optim.momentum, first.train.max_steps = 0.9 - momentum, 4
    run_ranks(train, 1, first.model_dump())
    config.run.dir, config.head.init_from = str(tmp_path / "second"), first.run.path
    config.head.optim.momentum = momentum
    old, new = begun(first), begun(config, workers=2)
    assert torch.equal(new["rows"]["weight"], old["rows"]["weight"])
    assert momentum == 0 or not new["rows"]["momentum"].any()


def files_read(topology: Topology, config: dict[str, Any]) -> list[str]:
    """Files of checkpoints whose checksums this rank compares before its first step."""
    read: list[str] = []
    whole = CheckpointFolder.first_corrupt_file

    def _counted(folder: CheckpointFolder, files: Iterable[Any]) -> str | None:
        files = list(files)
        read.extend(name for name, _ in files)
        return whole(folder, files)

    CheckpointFolder.first_corrupt_file = _counted  # type: ignore[method-assign]
    begin(topology, config)
    load_trained_backbone(config["model"]["init_from"], topology=topology)
    return read


def test_ranks_share_the_reading_of_the_checkpoint_that_they_begin_with(
    trained: Config, tmp_path: Path
) -> None:
    """It holds the rows of all classes: each rank alone would read W times as much as there is."""
    config = trained.model_copy(deep=True)
    config.run.dir, config.scale.workers = str(tmp_path), 2
    config.model.init_from = config.head.init_from = trained.run.path
    parts = run_ranks(files_read, 2, config.model_dump())
    files = CheckpointFolder(find_checkpoint(trained.run.path).path).manifest()
    assert isinstance(files, dict)
    read = Counter(name for part in parts for name in part)
    # For the rows, once. For the backbone, as a run and as commands under torchrun load it, each
    # rank looks at the small files alone.
    assert read == {name: 1 if name.endswith(".distcp") else 1 + 2 + 2 for name in files}


def test_what_cannot_be_taken_over_is_refused(trained: Config, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(trained.run.path)
    with pytest.raises(UserError, match="has 30 classes, this run 20"):
        grow_checkpoint(checkpoint, 20, str(tmp_path / "less"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint(str(tmp_path))
    with warnings.catch_warnings(), pytest.raises(UserError, match="/proc/grown"):
        warnings.simplefilter("error", CheckpointWarning)  # no training goes on
        grow_checkpoint(checkpoint, 40, "/proc/grown")
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(UserError, match=r"not a complete checkpoint: no manifest\.json"):
        find_checkpoint(str(tmp_path / "step_00000001"))
