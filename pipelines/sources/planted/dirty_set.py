"""A dirty copy of a clean data set: new shards and a label set beside it; its tars stay.

out/train       index of the clean tars, where they lie, and of new ones with strangers and
                copies of held-out images
out/plan.parquet  every fault: what is wrong, and what would be right
out/labels      the label set with the faults; written last
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.data.sample import read_sample
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.shards.label_set import LabelLists, LabelSet, label_set_exists, write_label_set
from pipelines.shards.tables import CLASSES_FILE, class_table, write_table
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.label_table.keys import read_keys
from pipelines.sources.planted.faults import (
    FaultRates,
    Ints,
    PlannedFaults,
    hash_names,
    plan_faults,
)
from pipelines.sources.planted.unseen_glyphs import ForeignImage
from pipelines.storage.urls import atomic_write, resolve_url, to_url

TRAIN, LABELS, PLAN_FILE = "train", "labels", "plan.parquet"
_PER_PART: Final = 1 << 20  # samples whose labels are written together
_COLUMNS: Final = {
    "kind": pa.string(),
    "key": pa.string(),
    "sample": pa.int64(),
    "true_class": pa.int64(),
    "second_true_class": pa.int64(),
    "planted_class": pa.int64(),
    "second_planted_class": pa.int64(),
    "source": pa.string(),
}


class _Planted(NamedTuple):
    """The samples of the new shards, in their order: the name of each, and its planted class."""

    keys: list[str]
    kinds: list[str]
    sources: list[str]
    labels: Ints


def plant_faults(
    train: ShardIndex,
    heldout: ShardIndex,
    foreign: Sequence[ForeignImage],
    out: str,
    seed: int,
    rates: FaultRates | None = None,
) -> LabelSet:
    """Make a dirty data set of a clean one; what is there already is kept.

    Args:
        train: the clean set; its index holds the labels.
        heldout: the evaluation set that some images leak from.
        foreign: images of none of its classes.
        out: folder or URL, see the module.
        seed: of all draws.
        rates: how much is planted; None: as `FaultRates` has it.

    Returns:
        The dirty label set; its index is `out/train`.

    Raises:
        UserError: the index holds no labels, or the set is too small for the rates.
    """
    if label_set_exists(f"{out}/{LABELS}"):
        return LabelSet.load(f"{out}/{LABELS}")
    keys, heldout_keys = _all_keys(train), _all_keys(heldout)
    names = [image.name for image in foreign]
    plan = plan_faults(
        _true_labels(train),
        keys,
        train.num_classes,
        heldout_keys,
        names,
        seed,
        rates or FaultRates(),
    )
    planted = _order_new(plan, heldout_keys, names, seed)
    if not index_exists(f"{out}/{TRAIN}"):
        _write_shards(train, heldout, foreign, plan, planted, f"{out}/{TRAIN}")
    _write_plan(f"{out}/{PLAN_FILE}", _plan_rows(plan, keys, train, planted))
    about = {"made_by": "planted faults", "seed": seed, "rates": asdict(rates or FaultRates())}
    with atomic_write(f"{out}/plan.json") as stream:
        counts = {"counts": _counts(plan), "clean": train.digest, "heldout": heldout.digest}
        stream.write(json.dumps(about | counts, indent=1).encode() + b"\n")
    return _write_labels(f"{out}/{LABELS}", f"{out}/{TRAIN}", plan, planted, train, about)


def _all_keys(index: ShardIndex) -> list[str]:
    sizes = enumerate(index.sizes.tolist())
    return [key for shard, size in sizes for key in read_keys(index, shard, 0, size)]


def _true_labels(index: ShardIndex) -> Ints:
    labels = [shard.labels for shard in index.shards]
    if any(part is None for part in labels):
        raise UserError(
            f"{index.folder}: its index holds no labels, so nobody knows what is true; make it "
            f"again with `mhe data index {shlex.quote(index.folder)}`"
        )
    return np.concatenate([part for part in labels if part is not None])


def _order_new(
    plan: PlannedFaults, heldout_keys: Sequence[str], foreign: Sequence[str], seed: int
) -> _Planted:
    """Shuffle strangers and copies together, so that neither place nor key tells what they are."""
    sources = [*(heldout_keys[number] for number in plan.leaked.tolist()), *foreign]
    kinds = ["leak"] * len(plan.leaked) + ["foreign"] * len(foreign)
    labels = np.concatenate([plan.leaked_labels, plan.foreign_labels])
    draws = hash_names(seed, "new", [f"{k}/{s}" for k, s in zip(kinds, sources, strict=True)])
    order = np.argsort(draws, kind="stable").tolist()
    return _Planted(
        [f"new-{number:06d}" for number in range(len(order))],
        [kinds[number] for number in order],
        [sources[number] for number in order],
        labels[order],
    )


def _write_shards(
    train: ShardIndex,
    heldout: ShardIndex,
    foreign: Sequence[ForeignImage],
    plan: PlannedFaults,
    planted: _Planted,
    folder: str,
) -> None:
    """The index of the clean tars and of one more; a new image's true class is the first of its."""
    data = {("foreign", image.name): image.data for image in foreign}
    for number in plan.leaked.tolist():
        sample = read_sample(heldout, number)
        data["leak", sample.key] = sample.data
    owner = np.empty(plan.classes.num_classes, np.int64)
    for true in (plan.classes.second, plan.classes.first):
        known = np.flatnonzero(true >= 0)[::-1]
        owner[true[known]] = known
    labels = owner[planted.labels].tolist()

    def samples() -> Iterator[Sample]:
        names = zip(planted.kinds, planted.sources, strict=True)
        for key, name, label in zip(planted.keys, names, labels, strict=True):
            yield Sample(key, {"jpg": data[name], "cls": str(label).encode()})

    with ShardWriter(folder, "new") as writer:
        writer.write(samples())
        # A relative path would be looked for in the new folder.
        urls = (to_url(*resolve_url(train.url(n))) for n in range(len(train.shards)))
        clean = [replace(s, url=url) for s, url in zip(train.shards, urls, strict=True)]
        writer.shards[:0] = clean
        names = names_of(train.folder, range(train.num_classes))
        about = {key: value for key, value in train.meta.items() if key in ("source", "settings")}
        if names:
            table = class_table(list(names.values()), writer.shards)
            write_table(f"{writer.folder}/{CLASSES_FILE}", table)
            about["class_names"] = CLASSES_FILE
        writer.finish(train.num_classes, about)


def _plan_rows(
    plan: PlannedFaults, keys: Sequence[str], train: ShardIndex, planted: _Planted
) -> Iterator[dict[str, Any]]:
    """A row for each fault; what does not apply is left out."""
    classes, labels = plan.classes, _true_labels(train)
    for true in classes.split.tolist():
        halves = int(classes.first[true]), int(classes.second[true])
        yield {
            "kind": "split",
            "true_class": true,
            "planted_class": halves[0],
            "second_planted_class": halves[1],
        }
    for one, other in classes.merged.tolist():
        yield {
            "kind": "merged",
            "true_class": one,
            "second_true_class": other,
            "planted_class": int(classes.first[one]),
        }
    for number in plan.relabelled.tolist():
        yield {
            "kind": "relabelled",
            "key": keys[number],
            "sample": number,
            "true_class": int(labels[number]),
            "planted_class": int(plan.labels[number]),
            "second_planted_class": int(plan.honest[number]),
        }
    new = zip(planted.keys, planted.kinds, planted.sources, planted.labels.tolist(), strict=True)
    for number, (key, kind, source, label) in enumerate(new, train.samples):
        yield {
            "kind": kind,
            "key": key,
            "sample": number,
            "planted_class": label,
            "source": source,
        }


def _write_plan(url: str, rows: Iterator[dict[str, Any]]) -> None:
    empty: dict[str, Any] = {
        name: "" if pa.types.is_string(kind) else -1 for name, kind in _COLUMNS.items()
    }
    table = pa.Table.from_pylist([empty | row for row in rows], pa.schema(_COLUMNS.items()))
    with atomic_write(url) as stream:
        pq.write_table(table, stream)


def _counts(plan: PlannedFaults) -> dict[str, int]:
    return {
        "split": len(plan.classes.split),
        "merged": len(plan.classes.merged),
        "relabelled": len(plan.relabelled),
        "foreign": len(plan.foreign_labels),
        "leak": len(plan.leaked),
    }


def _write_labels(
    target: str,
    folder: str,
    plan: PlannedFaults,
    planted: _Planted,
    train: ShardIndex,
    about: dict[str, Any],
) -> LabelSet:
    labels = np.concatenate([plan.labels, planted.labels])
    index = ShardIndex.load(folder)

    def parts() -> Iterator[LabelLists]:
        for start in range(0, len(labels), _PER_PART):
            part = labels[start : start + _PER_PART]
            yield LabelLists(np.arange(1, len(part) + 1), part)

    known = names_of(train.folder, range(train.num_classes))
    names = [known.get(number, str(number)) for number in range(train.num_classes)]
    return write_label_set(
        target, index, plan.classes.num_classes, parts, plan.classes.names(names), about
    )
