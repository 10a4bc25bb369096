"""The findings of an audit as its page shows them: some of each kind, the most certain first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mhe_dist.errors import UserError
from pipelines.audit.findings import (
    DUPLICATE,
    FIGURES_FILE,
    FINDINGS_FILE,
    FOREIGN,
    LEAK,
    MIXED,
    NO_ACTION,
    REPEATED,
    WRONG_LABEL,
)
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.storage.urls import resolve_url

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]

_PER_CHUNK: Final = 1 << 20  # labels that are looked at together


class KindText(NamedTuple):
    """What the page says of a kind of finding.

    Attributes:
        title: of its section.
        text: below it.
        accept: what accepting one means.
        one, more: what is counted.
    """

    title: str
    text: str
    accept: str
    one: str
    more: str


KINDS: Final[dict[str, KindText]] = {
    DUPLICATE: KindText(
        "One class under two names",
        "The images of both classes are as near to one another as those of one class are.",
        "the two classes become one",
        "pair of classes",
        "pairs of classes",
    ),
    MIXED: KindText(
        "Two classes under one name",
        "The images of the class lie in parts that are far from one another.",
        "each part becomes a class of its own",
        "class",
        "classes",
    ),
    WRONG_LABEL: KindText(
        "Images under a wrong name",
        "The image is nearer to the images of another class than to those of its own.",
        "the image goes to the other class",
        "image",
        "images",
    ),
    FOREIGN: KindText(
        "Images of no class",
        "The image is near to no class, not even to its own.",
        "the image is left out",
        "image",
        "images",
    ),
    REPEATED: KindText(
        "Repeated images",
        "Two images of the data set are equal or nearly so.",
        "the later image is left out",
        "image",
        "images",
    ),
    LEAK: KindText(
        "Leaks into an evaluation set",
        "What is trained on is in an evaluation set, too, so figures on that set are too good.",
        "the image or class is left out of training",
        "finding",
        "findings",
    ),
}


class Kind(NamedTuple):
    """The findings of a kind.

    Attributes:
        name: in the table.
        text: what the page says.
        total: findings in all, as the page counts them.
        shown: for each finding that is shown its rows; one row, or the images of a mixed class.
        figures: of `figures.json`.
    """

    name: str
    text: KindText
    total: int
    shown: list[list[Row]]
    figures: Mapping[str, Any]

    @property
    def left_out(self) -> int:
        """Findings that are not shown."""
        return self.total - len(self.shown)

    @property
    def changes_labels(self) -> bool:
        """Whether findings of this kind are applied to the label set."""
        actions = {row["action"] for rows in self.shown for row in rows}
        return not actions or actions != {NO_ACTION}


@dataclass(frozen=True)
class AuditFindings:
    """What an audit found.

    Attributes:
        columns: of the table, in order.
        kinds: in the order of the page; those without a finding, too.
        figures: of `figures.json`.
        doubted: int64, images that are findings by themselves, ascending.
    """

    columns: list[str]
    kinds: list[Kind]
    figures: Mapping[str, Any]
    doubted: Ints


def short_name(url: str) -> str:
    """The end of a path or URL, which tells data sets apart."""
    return "/".join(url.rstrip("/").split("/")[-2:])


def read_findings(folder: str, limit: int) -> AuditFindings:
    """Read what an audit wrote.

    Args:
        folder: with `findings.parquet` and `figures.json`.
        limit: findings of each kind that are shown.

    Raises:
        UserError: they are missing or damaged.
    """
    filesystem, path = resolve_url(folder)
    try:
        figures = json.loads(filesystem.cat_file(f"{path}/{FIGURES_FILE}"))
        with filesystem.open(f"{path}/{FINDINGS_FILE}", "rb") as stream:
            table = pq.read_table(stream)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no findings of an audit here ({error}); run `mhe audit`"
        ) from error
    kinds = [_kind(name, table, figures.get("kinds", {}).get(name, {}), limit) for name in KINDS]
    images = table.filter(pc.is_in(table["kind"], pa.array([WRONG_LABEL, FOREIGN])))
    doubted = np.unique(images["sample"].to_numpy()).astype(np.int64)
    return AuditFindings(table.column_names, kinds, figures, doubted)


def _kind(name: str, table: pa.Table, figures: Mapping[str, Any], limit: int) -> Kind:
    rows = table.filter(pc.equal(table["kind"], name))
    if name != MIXED:
        shown = [[row] for row in rows.slice(0, limit).to_pylist()]
        return Kind(name, KINDS[name], len(rows), shown, figures)
    classes = list(dict.fromkeys(rows["class"].to_pylist()))
    wanted = rows.filter(pc.is_in(rows["class"], pa.array(classes[:limit], pa.int64())))
    of_class: dict[int, list[Row]] = {number: [] for number in classes[:limit]}
    for row in wanted.to_pylist():
        of_class[row["class"]].append(row)
    return Kind(name, KINDS[name], len(classes), list(of_class.values()), figures)


class ClassMembers:
    """Some images of each of some classes, to show what the class is.

    Doubted images are shown only of a class that has no others.
    """

    def __init__(
        self,
        index: ShardIndex,
        labels: LabelSet | None,
        wanted: Iterable[int],
        doubted: Ints,
        limit: int,
    ) -> None:
        """Look the classes up; of all labels, only those of a chunk are in memory.

        Args:
            index: the data set.
            labels: its label set; None: the labels are those of the index.
            wanted: class ids.
            doubted: int64, ascending; images whose class is doubted.
            limit: images that are kept of a class.
        """
        classes = np.unique(np.fromiter(wanted, np.int64))
        self._rows: dict[int, list[int]] = {int(number): [] for number in classes}
        self._doubted: dict[int, list[int]] = {int(number): [] for number in classes}
        self.sizes = dict.fromkeys(self._rows, 0)
        for start in range(0, index.samples if len(classes) else 0, _PER_CHUNK):
            numbers = np.arange(start, min(start + _PER_CHUNK, index.samples))
            given = index.labels_of(numbers) if labels is None else labels.labels_of(numbers)
            if given is None:
                return  # the tars alone know the labels
            self._note(numbers, given, classes, doubted, limit)

    def _note(self, numbers: Ints, given: Ints, classes: Ints, doubted: Ints, limit: int) -> None:
        chosen = np.isin(given, classes)
        is_doubted = np.isin(numbers, doubted)
        triples = zip(numbers[chosen], given[chosen], is_doubted[chosen], strict=True)
        for number, label, in_doubt in triples:
            self.sizes[int(label)] += 1
            kept = (self._doubted if in_doubt else self._rows)[int(label)]
            if len(kept) < limit:
                kept.append(int(number))

    def of(self, number: int, count: int, without: Sequence[int] = ()) -> list[int]:
        """Up to so many images of a class, evenly over those that are known."""
        for known in (self._rows, self._doubted):
            rows = [row for row in known.get(number, []) if row not in without]
            if rows:
                positions = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
                return [rows[position] for position in positions.tolist()]
        return []
