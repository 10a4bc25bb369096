"""Renews the index of a data set where it lies: its tables become columns, or columns are mended.

The data set stays the same: its digest, which checkpoints record, does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from tempfile import TemporaryDirectory
from typing import Any

from mhe_dist.errors import UserError
from pipelines.shards.index import INDEX_FILE, ShardIndex, index_exists
from pipelines.shards.shard import Shard, write_columns
from pipelines.sources.convert import ImportResult
from pipelines.sources.webdataset import compact_values, number_labels
from pipelines.sources.webdataset_tar import DEFAULT_LAYOUT, SampleLayout, ScanTask, scan_tar
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.worker_pool import HERE, Progress, Workers, no_progress, run_tasks


def renew_index(
    folder: str, workers: Workers = HERE, progress: Progress = no_progress
) -> ImportResult | None:
    """Write the columns of a data set that lacks them, or lacks them in part.

    The tables of an index of format 1 become columns, and no tar is read. Of one whose columns are
    missing or damaged, all tars are read, and the columns are made as they were.

    Args:
        folder: path or URL of the data set.
        workers: who reads tars.
        progress: called with the finished tars and their number.

    Returns:
        None if there is no index, or nothing to renew.

    Raises:
        UserError: the folder cannot be written, or the tars are not those of the index.
    """
    if not index_exists(folder.removesuffix(INDEX_FILE).rstrip("/")):
        return None
    index = ShardIndex.read_table(folder)
    if index.is_packed:
        note = "its index has columns now; no tar was read, and its digest is the same"
    elif faults := _column_faults(index):
        note = f"its columns are made again ({'; '.join(faults)})"
    else:
        return None
    try:
        if index.is_packed:
            index.save()
        else:
            _mend(index, workers, progress)
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{index.folder}: no index can be written ({explain_fault(error)}); copy the data set "
            "to where one can"
        ) from error
    return ImportResult(ShardIndex.load(index.folder), [], [], [note])


def _column_faults(index: ShardIndex) -> list[str]:
    """What is wrong with the columns of an index: all their bytes are read."""
    found = ((column.entry.file, column.find_fault()) for column in index.columns)
    return [f"{file}: {fault}" for file, fault in found if fault]


def _mend(index: ShardIndex, workers: Workers, progress: Progress) -> None:
    """Write the columns of an index again, from its tars."""
    shards = _scan(index, workers, progress)
    with TemporaryDirectory() as trial:
        entries = {entry["file"]: entry for entry in write_columns(trial, shards).values()}
    for column in index.columns:
        if entries.get(column.entry.file) != asdict(column.entry):
            raise UserError(
                f"{column.url}: what the tars give is not the column of {INDEX_FILE}; delete "
                f"{INDEX_FILE}, and index the tars anew"
            )
    write_columns(index.folder, shards)


def _scan(index: ShardIndex, workers: Workers, progress: Progress) -> Sequence[Shard]:
    """The shards of an index with the tables that their tars give.

    Raises:
        UserError: a tar is not the one of the index.
    """
    fields, is_mapped = index.meta.get("fields"), bool(index.meta.get("class_names"))
    # Our own tars hold class ids. So do those of others, unless their labels had to be mapped.
    layout, num_classes = DEFAULT_LAYOUT, index.num_classes
    if fields is not None:
        layout = SampleLayout(tuple(fields["image"]), fields["label"])
        num_classes = 0 if is_mapped else num_classes
    tasks = [
        ScanTask(index.url(number), layout._replace(num_classes=num_classes))
        for number in range(len(index.shards))
    ]

    texts: dict[str, str] = {}

    def _compare(number: int, result: dict[str, Any]) -> None:
        shard = index.shards[number]
        for name in ("bytes", "checksum", "samples"):
            if result[name] != getattr(shard, name):
                raise UserError(
                    f"{index.url(number)}: its {name} {result[name]} is not that of {INDEX_FILE}, "
                    f"{getattr(shard, name)}: the tar was changed; delete {INDEX_FILE}, and index "
                    "the tars anew"
                )
        result["values"] = compact_values(result["values"], texts)

    results = run_tasks(scan_tar, tasks, workers, record=_compare, progress=progress)
    ordered = [(task.url, result) for task, result in zip(tasks, results, strict=True)]
    shards, _, _ = number_labels(ordered, index.folder, num_classes)
    if index.shards[0].has_labels:
        return shards
    return [replace(shard, classes="") for shard in shards]
