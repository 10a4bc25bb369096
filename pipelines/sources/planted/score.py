"""How well findings agree with the faults that were planted: precision and recall of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import isnan
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.urls import resolve_url

Fault = int | tuple[int, ...]


class KindScore(NamedTuple):
    """One kind of finding.

    Attributes:
        planted: faults of this kind.
        found: accused classes, pairs or images.
        right: of these, how many are such faults.
        recalled: faults that are among those found.
    """

    planted: int
    found: int
    right: int
    recalled: int

    @property
    def precision(self) -> float:
        """Share of what was found that is right; NaN: nothing was found."""
        return self.right / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        """Share of what was planted that was found; NaN: nothing was planted."""
        return self.recalled / self.planted if self.planted else float("nan")

    def as_dict(self) -> dict[str, float]:
        """For a record: counts and shares; a share of nothing is left out."""
        shares = {"precision": self.precision, "recall": self.recall}
        return self._asdict() | {name: value for name, value in shares.items() if not isnan(value)}


def score_findings(
    findings: pa.Table | Mapping[str, Any], plan: pa.Table | Mapping[str, Any]
) -> dict[str, KindScore]:
    """Compare the findings of an audit with a plan of faults.

    What counts as one finding, and as right:

    - `duplicate_classes`: a pair of classes; right if they are the halves of a class;
    - `mixed_class`: a class; right if it was merged of two;
    - `wrong_label`: an image; right if it was relabelled. A stranger is not: its cure is another;
    - `foreign`: an image; right if it is a stranger, or a copy of a held-out image, whose
      character is in no class either. Recall counts the strangers alone;
    - `leak`: an image; right if it is a copy of a held-out one. Findings about identities are not
      counted, because none were planted;
    - `doubted`: an image with a finding of the kinds `wrong_label`, `foreign` or `leak`; right if
      its class is wrong for any reason. Recall counts all of these images.

    Args:
        findings: columns `kind`, `sample`, `class`, `neighbour_class` of the labels that were
            planted (`findings.parquet`).
        plan: columns of `plan.parquet`.
    """
    rows, faults = _columns(findings), _columns(plan)
    images = {kind: _images(faults, kind) for kind in ("relabelled", "foreign", "leak")}
    found = {kind: _images(rows, kind) for kind in ("wrong_label", "foreign", "leak")}
    merged = _of_kind(faults, "merged", "planted_class")
    strangers = images["foreign"] | images["leak"]
    return {
        "duplicate_classes": _score(
            _pairs(rows, "duplicate_classes", "class", "neighbour_class"),
            _pairs(faults, "split", "planted_class", "second_planted_class"),
        ),
        "mixed_class": _score(_of_kind(rows, "mixed_class", "class"), merged),
        "wrong_label": _score(found["wrong_label"], images["relabelled"]),
        "foreign": _score(found["foreign"], images["foreign"], strangers),
        "leak": _score(found["leak"], images["leak"]),
        "doubted": _score(set().union(*found.values()), set().union(*images.values())),
    }


def read_table(url: str) -> pa.Table:
    """A Parquet table at a path or URL."""
    filesystem, path = resolve_url(url)
    with filesystem.open(path, "rb") as stream:
        return pq.read_table(stream)


def _columns(table: pa.Table | Mapping[str, Any]) -> Mapping[str, Any]:
    return table.to_pydict() if isinstance(table, pa.Table) else table


def _score(found: Set[Fault], planted: Set[Fault], right: Set[Fault] | None = None) -> KindScore:
    accepted = planted if right is None else right
    return KindScore(len(planted), len(found), len(found & accepted), len(found & planted))


def _of_kind(table: Mapping[str, Any], kind: str, column: str) -> set[Fault]:
    pairs = zip(table["kind"], table[column], strict=True)
    return {value for each, value in pairs if each == kind}


def _images(table: Mapping[str, Any], kind: str) -> set[Fault]:
    return _of_kind(table, kind, "sample") - {-1}


def _pairs(table: Mapping[str, Any], kind: str, one: str, other: str) -> set[Fault]:
    rows = zip(table["kind"], table[one], table[other], strict=True)
    return {tuple(sorted(pair)) for each, *pair in rows if each == kind}
