"""From findings to a label set: what is merged, split, relabelled and dropped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.audit.classes.pairs import group_pairs, merged_ids
from pipelines.audit.findings import DROP, MERGE, REJECT, RELABEL, SPLIT, Findings
from pipelines.clustering.rows import Ints
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import NO_LABEL, LabelLists, LabelSet, write_label_set

APPLICABLE: Final = (MERGE, SPLIT, RELABEL, DROP)
_PART: Final = 1 << 20  # samples that are written together


class CuredLabels(NamedTuple):
    """Labels after the findings were applied.

    Attributes:
        labels: int32 `[N]`, `NO_LABEL`: left out.
        num_classes: classes that have an image, numbered without gaps.
        sources: int64 `[C]`, the class of before that each was, or is a part of.
        parts: int64 `[C]`, 0, or the number of the part that was split off.
        applied: how many findings were, by action.
    """

    labels: npt.NDArray[np.int32]
    num_classes: int
    sources: Ints
    parts: Ints
    applied: dict[str, int]

    def lists(self) -> Iterator[LabelLists]:
        """The labels as a label set holds them, part by part."""
        for start in range(0, len(self.labels), _PART):
            part = self.labels[start : start + _PART]
            there = part != NO_LABEL
            yield LabelLists(np.cumsum(there), part[there].astype(np.int64))

    def names(self, before: Sequence[str]) -> Iterator[str]:
        """The names of the classes; a part that was split off has its number behind the name."""
        taken = set(before)
        for source, part in zip(self.sources.tolist(), self.parts.tolist(), strict=True):
            name = before[source]
            if part:
                name, number = f"{name} ({part + 1})", part + 1
                while name in taken:
                    number += 1
                    name = f"{before[source]} ({number})"
                taken.add(name)
            yield name


def parse_actions(text: str) -> tuple[str, ...]:
    """The actions that `--apply` names.

    Raises:
        UserError: one of them is none.
    """
    named = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in named:
        if word not in APPLICABLE:
            raise UserError(
                f"--apply {text}: {word!r} is no action; choose among {', '.join(APPLICABLE)}"
            )
    return named


def cure_labels(
    labels: npt.NDArray[Any],
    num_classes: int,
    findings: Findings,
    actions: Sequence[str],
    decisions: npt.NDArray[Any] | None = None,
) -> CuredLabels:
    """Apply findings to labels.

    First classes are split, then images get their other label, then classes are merged, and last
    images are dropped. An image that is relabelled into a class that is split goes to its larger
    part.

    Args:
        labels: int32 `[N]`, of before.
        num_classes: C of before.
        findings: all of them.
        actions: those that are applied.
        decisions: see `read_decisions`; None: none was made.
    """
    wanted = np.isin(findings["action"].astype(str), actions)
    if decisions is not None:
        wanted &= decisions != REJECT
    chosen = {action: findings.of(wanted & (findings["action"] == action)) for action in actions}
    none = findings.of(np.zeros(len(findings), bool))
    cured = np.array(labels, np.int32)
    split, relabel = chosen.get(SPLIT, none), chosen.get(RELABEL, none)
    pieces = np.stack([split["class"], split["group"]], 1)
    distinct, numbers = np.unique(pieces, axis=0, return_inverse=True)
    cured[split["sample"]] = num_classes + numbers.reshape(-1)
    cured[relabel["sample"]] = relabel["neighbour_class"]
    ids = np.arange(num_classes + len(distinct))
    merged = _merge(chosen.get(MERGE, none), num_classes)
    ids[:num_classes] = merged
    cured = np.where(cured >= 0, ids[cured], NO_LABEL).astype(np.int32)
    cured[chosen.get(DROP, none)["sample"]] = NO_LABEL
    sources = np.concatenate([np.arange(num_classes), distinct[:, 0].astype(np.int64)])
    parts = np.concatenate([np.zeros(num_classes, np.int64), distinct[:, 1].astype(np.int64)])
    filled = np.bincount(cured[cured >= 0], minlength=len(ids)) > 0
    renumbered = np.where(filled, np.cumsum(filled) - 1, NO_LABEL)
    final = np.where(cured >= 0, renumbered[cured], NO_LABEL).astype(np.int32)
    applied = {action: len(part) for action, part in chosen.items()}
    return CuredLabels(final, int(filled.sum()), sources[filled], parts[filled], applied)


def _merge(pairs: Findings, classes: int) -> Ints:
    """int64 `[C]`: see `merged_ids`; components are found anew, because pairs may be rejected."""
    first, second = pairs["class"], pairs["neighbour_class"]
    return merged_ids(first, second, group_pairs(first, second), classes)


def write_cure(
    target: str, index: ShardIndex, cured: CuredLabels, names: Sequence[str], meta: dict[str, Any]
) -> LabelSet:
    """Write cured labels as a label set; one of before is replaced when the new one is whole.

    Args:
        target: its folder, on this machine.
        index: the data set.
        cured: the labels.
        names: of the classes of before.
        meta: JSON-able, what it was made from.
    """
    folder = Path(target)
    fresh, old = (folder.with_name(f".{folder.name}-{word}") for word in ("new", "old"))
    for each in (fresh, old):
        shutil.rmtree(each, ignore_errors=True)
    write_label_set(
        str(fresh),
        index,
        cured.num_classes,
        cured.lists,
        cured.names(names),
        {"made_by": "mhe audit", "applied": cured.applied, **meta},
    )
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return LabelSet.load(target)
