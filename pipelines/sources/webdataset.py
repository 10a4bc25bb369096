"""An index for shards that somebody else wrote: any tars in WebDataset's layout, left as they are.

Every tar is read once, from front to back. The index then holds where its samples are, and their
labels as numbers in `[0, C)`, whatever the tars call them. So the tars stay as they are.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError
from pipelines.shards.index import INDEX_FILE, Fault, ShardIndex
from pipelines.shards.packing import pack_labels, unpack_labels
from pipelines.shards.shard import Shard
from pipelines.shards.tables import CLASSES_FILE, class_table, skipped_table, write_table
from pipelines.sources.convert import ImportResult, check_bad_fraction
from pipelines.sources.text_column import TextColumn
from pipelines.sources.webdataset_tar import (
    DEFAULT_LAYOUT,
    INTEGER,
    MOST_NAMED,
    SampleLayout,
    ScanTask,
    scan_tar,
)
from pipelines.storage.staging import Journal, is_begun
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.urls import (
    is_local,
    list_folder,
    protocol_names,
    resolve_url,
    to_url,
    url_exists,
)
from pipelines.storage.worker_pool import HERE, Progress, Workers, no_progress, run_tasks

Ints = npt.NDArray[np.int64]
Values = Ints | list[str]
"""The distinct labels of a tar: numbers if all of them are written as numbers are, else texts."""

_JOURNAL: Final = ".index.partial"
_SHOWN: Final = 20  # damaged tars that a message names
# A tar in a compressed form cannot be read from the middle.
_TOOLS: Final = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip -S .tgz",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
}


def index_shards(
    given: Sequence[str],
    out: str = "",
    layout: SampleLayout = DEFAULT_LAYOUT,
    skip_damaged: bool = False,
    max_bad: float = 0.01,
    workers: Workers = HERE,
    progress: Progress = no_progress,
) -> ImportResult:
    """Write `index.json` for tars, and `classes.tsv` if their labels had to be mapped.

    Args:
        given: tars by path or URL, with `{000..099}` or `*`, or folders of tars.
        out: folder or URL for the index; the tars' folder if empty.
        layout: of the samples.
        skip_damaged: take what can be read of a damaged tar, instead of refusing it.
        max_bad: largest share of samples that may be left out because they are bad.
        workers: who reads.
        progress: called with the finished tars and their number.

    Raises:
        UserError: no tars, an index that exists, a damaged tar, no usable sample.
        RunError: too many samples are bad.
    """
    tars = expand_tars(given)
    folder = _absolute(out or _common_folder(tars)).rstrip("/")
    journal = _journal(folder, [tars, layout])
    results = _scan_all([ScanTask(tar, layout) for tar in tars], journal, workers, progress)
    journal.mark_ended()
    damaged = [Fault(tar, found["damage"]) for tar, found in results if found["damage"]]
    if damaged and not skip_damaged:
        raise UserError(
            f"{len(damaged)} of {len(tars)} tars are damaged; get them again, or take what can be "
            f"read of them with --skip-damaged:\n  "
            + "\n  ".join(map(": ".join, damaged[:_SHOWN]))
            + (f"\n  and {len(damaged) - _SHOWN:,} more" if len(damaged) > _SHOWN else "")
        )
    faults = damaged + [Fault(*fault) for _, found in results for fault in found["faults"]]
    unnamed = sum(found.get("unnamed", 0) for _, found in results)
    shards, names, num_classes = number_labels(results, folder, layout.num_classes)
    fields = {"image": list(layout.images), "label": layout.label}
    about = {"source": "index", "fields": fields, "class_names": CLASSES_FILE if names else None}
    index = ShardIndex(folder, num_classes, shards, about | {"skipped": len(faults) + unnamed})
    check_bad_fraction(faults, index.samples, max_bad, unnamed)
    if unnamed:
        faults.append(Fault(folder, f"{unnamed:,} more bad samples, which are not named"))
    if not index.samples:
        raise UserError(f"{tars[0]}: no sample with an image and a label here")
    tables = {CLASSES_FILE: class_table(names, shards)} if names else {}
    for name, table in {**tables, **skipped_table(faults)}.items():
        write_table(f"{folder}/{name}", table)
    index.save()
    journal.remove()
    return ImportResult(index, faults, [])


def _journal(folder: str, recipe: Any) -> Journal:
    """The journal of an attempt, unless the folder is indexed already."""
    # An attempt writes the index last, so a table of classes may be its own.
    is_own = is_begun(f"{folder}/{_JOURNAL}", recipe)
    for name in (INDEX_FILE,) if is_own else (INDEX_FILE, CLASSES_FILE):
        if url_exists(f"{folder}/{name}"):
            raise UserError(f"{folder}/{name}: already exists; delete it or choose another --out")
    try:
        return Journal(f"{folder}/{_JOURNAL}", recipe)
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{folder}: no index can be written ({explain_fault(error)}); choose another --out"
        ) from error


def expand_tars(given: Sequence[str]) -> list[str]:
    """The tars that paths and patterns name, each once, in order; local ones by absolute path.

    Raises:
        UserError: there are none.
    """
    found: dict[str, None] = {}
    for pattern in given:
        for url in _unfold(pattern):
            matches = _matches(url)
            if not matches:
                raise UserError(f"{url}: no tars here{_compressed_tars(url)}")
            found |= dict.fromkeys(matches)
    return list(found)


def _unfold(pattern: str) -> list[str]:
    """What the braces of a pattern stand for; the name of a file or folder stands for itself."""
    if _is_name(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: {error}") from error


def _is_name(url: str) -> bool:
    """Whether something of this machine is called so, even a broken link."""
    return os.path.lexists(local_path(url))


def _matches(url: str) -> list[str]:
    filesystem, path = resolve_url(url)
    is_web = "http" in protocol_names(filesystem)
    is_pattern = "*" in url and not _is_name(url)
    if is_web or (url.endswith(".tar") and not is_pattern):
        return [_absolute(url)]
    found = sorted(filesystem.glob(path)) if is_pattern else _files_ending(url, ".tar")
    return [to_url(filesystem, match) for match in found]


def _files_ending(folder: str, ending: str) -> list[str]:
    return [name for name in list_folder(folder) if name.endswith(ending)]


def _compressed_tars(url: str) -> str:
    """What to type if a folder holds compressed tars only."""
    for ending, tool in _TOOLS.items():
        if "*" not in url and (found := _files_ending(url, ending)):
            files = f"{shlex.quote(url)}/*{ending}"
            return f", but {len(found)} *{ending}; unpack them first: {tool} {files}"
    return ""


def _absolute(url: str) -> str:
    """A local path as an absolute one, so that it does not depend on the working folder."""
    filesystem, path = resolve_url(url)
    return path if is_local(filesystem) else url


def _common_folder(tars: Sequence[str]) -> str:
    folders = {tar.rpartition("/")[0] or "." for tar in tars}
    if len(folders) > 1:
        raise UserError(
            f"the tars lie in {len(folders)} folders: say where the index goes with --out"
        )
    return folders.pop()


def _scan_all(
    tasks: list[ScanTask], journal: Journal, workers: Workers, progress: Progress
) -> list[tuple[str, dict[str, Any]]]:
    """What is in each tar; finished ones are taken from the journal unless the tar has changed."""
    named, texts = 0, dict[str, str]()

    def _compact(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal named
        named += _forget_names(found, MOST_NAMED - named)
        found["values"] = compact_values(found["values"], texts)
        return found

    def finished(number: int) -> dict[str, Any] | None:
        kept = _finished_result(journal, number, tasks[number].url)
        return None if kept is None else _compact(kept)

    def record(number: int, found: dict[str, Any]) -> None:
        if not found["damage"]:
            journal.record(number, found)
        _compact(found)

    results = run_tasks(scan_tar, tasks, workers, finished, record, progress)
    return [(task.url, found) for task, found in zip(tasks, results, strict=True)]


def _forget_names(found: dict[str, Any], limit: int) -> int:
    """Keep so many bad samples of a tar by name, and count the others; how many were kept."""
    faults, kept = found["faults"], found["faults"][: max(0, limit)]
    found["faults"] = kept
    found["unnamed"] = found.get("unnamed", 0) + len(faults) - len(kept)
    return len(kept)


def _finished_result(journal: Journal, number: int, url: str) -> dict[str, Any] | None:
    kept: dict[str, Any] | None = journal.get(number)
    if kept is None:
        return None
    filesystem, path = resolve_url(url)
    return kept if filesystem.exists(path) and filesystem.size(path) == kept["bytes"] else None


def number_labels(
    results: Sequence[tuple[str, dict[str, Any]]], folder: str, num_classes: int
) -> tuple[list[Shard], Sequence[str], int]:
    """The shards with labels in `[0, C)`; the classes' names, if they were no such numbers; C.

    Args:
        results: url and content of each tar, whose `values` are those of `compact_values`.
        folder: of the index.
        num_classes: C, if it is known; else 0.
    """
    classes = number_classes([found["values"] for _, found in results], num_classes)
    shards = []
    for (url, found), class_ids in zip(results, classes.by_tar, strict=True):
        labels = class_ids[unpack_labels(found["codes"], found["samples"])]
        fields = {key: found[key] for key in ("samples", "bytes", "checksum", "blocks")}
        relative = url.removeprefix(f"{folder}/")
        shards.append(Shard(url=relative, classes=pack_labels(labels), **fields))
    return shards, classes.names, classes.num_classes


class ClassIds(NamedTuple):
    """What the labels of some tars become.

    Attributes:
        by_tar: for each tar the class ids of its distinct labels, int64.
        names: labels by class id; empty: the labels are class ids already.
        num_classes: C.
    """

    by_tar: list[Ints]
    names: Sequence[str]
    num_classes: int


def compact_values(values: Sequence[str], known: dict[str, str]) -> Values:
    """The distinct labels of a tar, to be kept: 8 bytes each, and a text once for all tars.

    Shuffled tars of many classes have about as many of them as samples.

    Args:
        values: as texts.
        known: texts of all tars; new ones are added.
    """
    if all(INTEGER.fullmatch(value) and str(int(value)) == value for value in values):
        return np.array([int(value) for value in values], np.int64)
    return [known.setdefault(value, value) for value in values]


def number_classes(tars: Sequence[Values], num_classes: int) -> ClassIds:
    """Number the labels of some tars: in their order, numbers by their size.

    Args:
        tars: the distinct labels of each, from `compact_values`.
        num_classes: C, if the labels are numbers in `[0, C)` already; 0: find out.
    """
    numbers = [values for values in tars if not isinstance(values, list)]
    if len(numbers) < len(tars):
        return _number_texts([_as_texts(values) for values in tars], num_classes)
    if num_classes:
        return ClassIds(numbers, [], num_classes)
    found = np.unique(np.concatenate([np.empty(0, np.int64), *numbers]))
    if np.array_equal(found, np.arange(len(found))):
        return ClassIds(numbers, [], len(found))
    ids = [np.searchsorted(found, values).astype(np.int64) for values in numbers]
    return ClassIds(ids, TextColumn(map(str, found)), len(found))


def _number_texts(tars: Sequence[list[str]], num_classes: int) -> ClassIds:
    values = sorted({value for tar in tars for value in tar})
    numbers = _as_numbers(values)
    if numbers is not None:
        values = [value for _, value in sorted(zip(numbers, values, strict=True))]
    is_mapped = not num_classes and (numbers is None or sorted(numbers) != list(range(len(values))))
    number = {value: n if is_mapped else int(value) for n, value in enumerate(values)}
    by_tar = [np.array([number[value] for value in tar], np.int64) for tar in tars]
    return ClassIds(by_tar, values if is_mapped else [], num_classes or len(values))


def _as_texts(values: Values) -> list[str]:
    return values if isinstance(values, list) else [str(value) for value in values.tolist()]


def _as_numbers(values: Sequence[str]) -> list[int] | None:
    """The numbers that the labels are, unless some are none or two are the same (`7` and `007`)."""
    if not all(INTEGER.fullmatch(value) for value in values):
        return None
    numbers = [int(value) for value in values]
    return numbers if len(set(numbers)) == len(numbers) else None
