"""A run's checkpoint for people who import: open it, and read class centres by class id."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank
from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.checkpoint.reader import Checkpoint
from mhe_dist.config.stored import stored_config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.row_head import RowHead
from pipelines.runs.folder import find_checkpoint_folder
from pipelines.runs.warm_start import (
    HEAD_PREFIX,
    find_checkpoint,
    head_of_checkpoint,
    load_head_state,
    refuse_damaged_head,
)

_CHUNK_BYTES: Final = 1 << 27  # of the rows around the wanted ones that are read together


def open_checkpoint(run: str) -> Checkpoint:
    """The newest complete checkpoint of a run, or the one that is named.

    Args:
        run: path, URL or name of the run; or a `step_*` folder among its checkpoints.

    Raises:
        UserError: there is none.
    """
    return find_checkpoint(find_checkpoint_folder(run))


def class_centres(checkpoint: str | Checkpoint, classes: Sequence[int] | Tensor) -> Tensor:
    """Rows of a head by class id, whatever permutation, groups and number of ranks trained it.

    Only the groups that hold the classes are read, and checked. A class that no step met has its
    first row.

    Args:
        checkpoint: an open one, or what `open_checkpoint` takes.
        classes: int64 class ids `[n]`, in any order.

    Returns:
        float32 `[n, D]` on the host, not normalised; `[n, D + 1]`, the bias last, where the head
        has no margin (`head.margin.kind=none`).

    Raises:
        UserError: a class is not in `[0, C)`, a group is damaged, or the head has no row per class
            (mhp, mhc).
    """
    opened = open_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    labels = torch.as_tensor(classes, dtype=torch.int64)
    config = stored_config(opened.run["config"]).head
    if config.kind in ("mhp", "mhc"):
        raise UserError(f"{opened.path}: head.kind={config.kind} has no row for each class")
    with tempfile.TemporaryDirectory(prefix="mhe-rows-") as folder:
        # Of one group, which tells the layout: no machine need have room for the rows of all.
        head = head_of_checkpoint(opened, Topology(0, config.chosen_groups), folder)
        assert isinstance(head, RowHead)
        layout = _saved_layout(head, opened)
        units, slots = layout.locate(labels)
        if (units < 0).any():
            wrong = int(labels[units < 0][0])
            raise UserError(f"{opened.path}: class {wrong} is outside [0, {layout.num_classes})")
        rows = torch.empty(len(labels), head.width)
        owners = layout.group_of(units)
        for group in owners.unique().tolist():
            # The rank that would own this group alone.
            part = head_of_checkpoint(opened, Topology(group, layout.groups), folder)
            assert isinstance(part, RowHead)
            refuse_damaged_head(part, opened)
            load_head_state(part, opened)
            wanted = owners == group
            rows[wanted] = _read_rows(part.bank, units[wanted], slots[wanted]).float()
    return rows


def _saved_layout(head: RowHead, checkpoint: Checkpoint) -> LabelLayout:
    """Where each class lived when the checkpoint was saved."""
    if not head.permutations.every:
        return head.layout
    name = f"{HEAD_PREFIX}permutation"
    return head.permutations.layout(int(checkpoint.load(lambda each: each == name)[name]))


def _read_rows(bank: Bank, units: Tensor, slots: Tensor) -> Tensor:
    """Single rows `[n, width]` of a bank."""
    distinct, inverse = units.unique(return_inverse=True)
    chunk = max(1, _CHUNK_BYTES // (bank.length * bank.width * 4))
    rows = torch.empty(len(units), bank.width)
    for start in range(0, len(distinct), chunk):
        here = (inverse >= start) & (inverse < start + chunk)
        read = bank.read(distinct[start : start + chunk])
        rows[here] = read[inverse[here] - start, slots[here]]
    return rows
