"""Class centres by class id, out of checkpoints of each head; embeddings of arrays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import save_config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.row_head import RowHead
from pipelines import class_centres, embed_arrays, load_trained_backbone, open_checkpoint
from pipelines.runs import checkpoints
from pipelines.runs.warm_start import (
    HEAD_PREFIX,
    find_checkpoint,
    head_of_checkpoint,
    load_head_state,
    trained_head,
)
from tests.support import tiny
from tests.support.checkpoint_damage import flip_a_byte_of

GOLDEN = Path(__file__).parents[3] / "golden" / "checkpoints"
CLASSES = list(range(tiny.CLASSES))[::-1]


def path_of(head: str) -> str:
    return str(next((GOLDEN / head).glob("step_*")))


def rows_by_class(head: RowHead) -> Tensor:
    """All rows of a head on one rank, in the order of the classes."""
    layout = head.layout
    units = torch.arange(layout.heads)
    classes = layout.classes(units[:, None], torch.arange(layout.length)[None, :]).flatten()
    rows = head.bank.read(units).flatten(0, 1)
    found = torch.zeros(layout.num_classes, rows.shape[1])
    found[classes[classes >= 0]] = rows[classes >= 0].float()
    return found


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 27])
@pytest.mark.parametrize("name", ["mhs_route", "mhs_gather", "full", "partial_fc"])
def test_class_centres_are_those_of_the_whole_head(
    name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", chunk_bytes)
    opened = open_checkpoint(path_of(name))
    head = head_of_checkpoint(opened, Topology(), str(tmp_path))
    assert isinstance(head, RowHead)
    load_head_state(head, opened)
    expected = rows_by_class(head)
    assert torch.equal(class_centres(opened, CLASSES), expected[CLASSES])
    assert torch.equal(class_centres(path_of(name), [7, 3, 7]), expected[[7, 3, 7]])


def test_class_centres_need_room_for_one_group_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10^8 classes all rows and their state are 410 GB, those of one of 1,024 groups 0.4."""
    units: list[int] = []

    def _built(*arguments: Any) -> Any:
        head = head_of_checkpoint(*arguments)
        units.append(len(head.bank.units))  # type: ignore[attr-defined]
        return head

    monkeypatch.setattr(checkpoints, "head_of_checkpoint", _built)
    opened = open_checkpoint(path_of("full"))
    class_centres(opened, CLASSES)
    groups = opened.run["config"]["head"]["groups"]
    assert groups > 1 and max(units) <= -(-tiny.CLASSES // groups)


def damaged_run(folder: Path, tensor: str) -> str:
    """A run one of whose tensors has a flipped bit."""
    opened = open_checkpoint(path_of("full"))
    step = folder / "full" / "checkpoints" / Path(opened.path).name
    shutil.copytree(opened.path, step)
    save_config(stored_config(opened.run["config"]), str(folder / "full" / "config.yaml"))
    flip_a_byte_of(step, tensor)
    return str(folder / "full")


def test_damaged_rows_are_found_by_who_reads_them_and_the_backbone_is_read_without_them(
    tmp_path: Path,
) -> None:
    run = damaged_run(tmp_path, f"{HEAD_PREFIX}rows/00002/weight")
    backbone = load_trained_backbone(run)
    assert backbone.step == 3
    with pytest.raises(UserError, match="has no complete checkpoint"):
        find_checkpoint(run)
    checkpoint = find_checkpoint(backbone.checkpoint)
    damaged = r"rows/00002/weight in .* does not have the CRC-32 .* an older step_\* folder"
    with pytest.raises(UserError, match=damaged), trained_head(checkpoint, Topology()):
        pass
    with pytest.raises(UserError, match=damaged):
        class_centres(run, CLASSES)
    head = head_of_checkpoint(checkpoint, Topology(), str(tmp_path / "rows"))
    assert isinstance(head, RowHead)
    groups = head.layout.group_of(head.layout.locate(torch.tensor(CLASSES))[0])
    sound = torch.tensor(CLASSES)[groups != 2]
    assert torch.equal(class_centres(run, sound), class_centres(path_of("full"), sound))


def test_a_damaged_backbone_is_found_in_a_run_and_in_a_folder_that_is_named(tmp_path: Path) -> None:
    run = damaged_run(tmp_path, "model.neck.weight")
    with pytest.raises(UserError, match="has no complete checkpoint"):
        load_trained_backbone(run)
    with pytest.raises(UserError, match=r"model\.neck\.weight in .* does not have the CRC-32"):
        load_trained_backbone(f"{run}/checkpoints/step_00000003")


@pytest.mark.parametrize("name", ["mhp", "mhc"])
def test_heads_without_a_row_per_class_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"head\.kind={name} has no row"):
        class_centres(path_of(name), [1])


def test_a_class_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"class 30 is outside \[0, 30\)"):
        class_centres(path_of("full"), [3, tiny.CLASSES])


def test_a_checkpoint_after_the_classes_moved(tmp_path: Path) -> None:
    """With `repartition_every` the second permutation is in force when it is saved."""
    opened = open_checkpoint(path_of("mhs_route"))
    run: dict[str, Any] = opened.run
    run["config"]["head"].setdefault("mhs", {})["repartition_every"] = 1
    run["samples"] = run["config"]["train"]["global_batch"]  # an epoch is a step
    head = head_of_checkpoint(opened, Topology(), str(tmp_path / "rows"))
    assert isinstance(head, RowHead)
    labels = torch.arange(4).repeat(run["config"]["train"]["micro_batch"] // 4).unsqueeze(0)
    for step in range(2):
        head.plan(step, labels)
        head(torch.randn(labels.shape[1], head.spec.width, requires_grad=True), labels[0])
        head.step(0.1)
    assert head.permutation == 1
    store = CheckpointStore(str(tmp_path), Topology())
    store.save(2, {HEAD_PREFIX + name: t for name, t in head.state().tensors.items()}, {}, run)
    store.wait()
    found = class_centres(str(tmp_path / "step_00000002"), CLASSES)
    assert torch.equal(found, rows_by_class(head)[CLASSES])


def test_arrays_are_embedded_in_either_layout(tmp_path: Path) -> None:
    run = tiny.trained_run(tmp_path, "unused").run.path
    backbone = load_trained_backbone(run)
    images = np.random.default_rng(0).integers(0, 256, (5, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    found = embed_arrays(backbone, images, batch_size=2)
    assert found.dtype == np.float32 and found.shape == (5, backbone.config.model.embedding_dim)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(torch.from_numpy(found), backbone.embed(tensor))
    assert np.array_equal(embed_arrays(backbone, tensor, batch_size=2), found)
    assert embed_arrays(backbone, images[:0]).shape == (0, found.shape[1])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, tiny.SIDE, 8), np.uint8),
        np.zeros((2, tiny.SIDE, tiny.SIDE, 3), np.float32),
        np.zeros((tiny.SIDE, tiny.SIDE, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused_with_what_is_needed(images: Any, tmp_path: Path) -> None:
    backbone = load_trained_backbone(tiny.trained_run(tmp_path, "unused").run.path)
    with pytest.raises(UserError, match=r"needs torch\.uint8 \[N, 16, 16, 3\]"):
        embed_arrays(backbone, images)
