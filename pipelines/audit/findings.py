"""The table of all findings, and what a person decided about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.storage.buffered_file import open_buffered
from pipelines.storage.csv_table import encode_rows, read_rows, spell_out
from pipelines.storage.urls import atomic_write, resolve_url

FINDINGS_FILE: Final = "findings.parquet"
FIGURES_FILE: Final = "figures.json"
DECISIONS_FILE: Final = "decisions.csv"
DECISION: Final = "decision"
ACCEPT, REJECT = "accept", "reject"
DUPLICATE, MIXED, WRONG_LABEL, FOREIGN, REPEATED, LEAK = KINDS = (
    *("duplicate_classes", "mixed_class", "wrong_label"),
    *("foreign", "repeated", "leak"),
)
MERGE, SPLIT, RELABEL, DROP, NO_ACTION = "merge", "split", "relabel", "drop", "none"
COLUMNS: Final = {  # name: type, and what it is where there is none
    "kind": ("string", ""),
    "key": ("string", ""),
    "sample": ("int64", -1),
    "class": ("int64", -1),
    "class_name": ("string", ""),
    "neighbour_class": ("int64", -1),
    "neighbour_name": ("string", ""),
    "neighbour_key": ("string", ""),
    "neighbour_sample": ("int64", -1),
    "neighbour_set": ("string", ""),
    "score": ("float32", 0.0),
    "probability": ("float32", 0.0),
    "group": ("int64", -1),
    "action": ("string", NO_ACTION),
}
# Columns that tell a finding from all others. No keys: spreadsheets make 7 of 007.
IDENTITY: Final = (
    *("kind", "sample", "class", "neighbour_class", "neighbour_sample", "neighbour_set"),
    "group",
)
_ROWS: Final = 1 << 16  # rows of the CSV that are in memory together


@dataclass(frozen=True)
class Findings:
    """Findings, one a row; `columns` are arrays of the same length, by the names in `COLUMNS`."""

    columns: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["kind"])

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def of(self, chosen: npt.NDArray[Any]) -> Findings:
        """Some of them: bool `[n]`, or numbers of rows."""
        return Findings({name: values[chosen] for name, values in self.columns.items()})


def make_findings(kind: str, count: int, **given: Any) -> Findings:
    """Findings of one kind, the most certain first; `class_` stands for the column `class`.

    Args:
        kind: one of `KINDS`.
        count: how many.
        given: columns, arrays `[count]` or one value for all; the others are empty.
    """
    columns: dict[str, npt.NDArray[Any]] = {}
    values = {name.rstrip("_"): value for name, value in given.items()} | {"kind": kind}
    for name, (dtype, empty) in COLUMNS.items():
        kept = object if dtype == "string" else dtype
        column = np.empty(count, kept)
        column[:] = values.get(name, empty)
        columns[name] = column
    keys = ("neighbour_sample", "neighbour_class", "sample", "class")
    certain = -columns["score"], -columns["probability"]
    order = np.lexsort((*(columns[key] for key in keys), *certain))
    return Findings(columns).of(order)


def join_findings(parts: Sequence[Findings]) -> Findings:
    """All findings in one table, in the order given."""
    return Findings({name: np.concatenate([part[name] for part in parts]) for name in COLUMNS})


def write_findings(folder: str, findings: Findings) -> None:
    """Write `findings.parquet`, and `decisions.csv`, the same rows to be decided about.

    Bytes of names that are not UTF-8 are spelled out in both, see `csv_table.spell_out`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = {}
    for name, (dtype, _) in COLUMNS.items():
        values = map(spell_out, findings[name]) if dtype == "string" else findings[name]
        columns[name] = pa.array(values, pa.type_for_alias(dtype))
    table = pa.table(columns)
    with atomic_write(f"{folder}/{FINDINGS_FILE}") as stream:
        parquet.write_table(table, stream)
    with atomic_write(f"{folder}/{DECISIONS_FILE}") as stream:
        stream.write(encode_rows([[*COLUMNS, DECISION]]))
        for start in range(0, len(findings), _ROWS):
            part = [findings[name][start : start + _ROWS].tolist() for name in COLUMNS]
            stream.write(encode_rows([*row, ""] for row in zip(*part, strict=True)))


def read_findings(folder: str) -> Findings:
    """The findings that an audit wrote.

    Raises:
        UserError: there are none.
    """
    from pyarrow import ArrowInvalid, parquet

    filesystem, path = resolve_url(f"{folder}/{FINDINGS_FILE}")
    try:
        with filesystem.open(path, "rb") as stream:
            table = parquet.read_table(stream)
        columns = {
            name: table.column(name).to_numpy().astype(object if dtype == "string" else dtype)
            for name, (dtype, _) in COLUMNS.items()
        }
    except (OSError, KeyError, ArrowInvalid) as error:
        raise UserError(
            f"{folder}/{FINDINGS_FILE}: no findings of mhe audit ({error}); make them again"
        ) from error
    return Findings(columns)


class Decision(NamedTuple):
    """A row of decisions.csv: its line, what it is about (`IDENTITY`), and what was decided."""

    line: int
    finding: tuple[str, ...]
    decision: str


class Decisions(NamedTuple):
    """What a person decided: the rows of a file, and its path or URL."""

    path: str
    rows: list[Decision]

    def match(self, findings: Findings) -> npt.NDArray[Any]:
        """What was decided, `[n]` of `ACCEPT`, `REJECT` or empty, for each finding of an audit.

        Raises:
            UserError: a row is no finding of this audit.
        """
        position = {_identity(row): number for number, row in enumerate(_identities(findings))}
        decided = np.full(len(findings), "", object)
        for row in self.rows:
            number = position.get(row.finding)
            if number is None:
                about = dict(zip(IDENTITY, row.finding, strict=True))
                raise UserError(
                    f"{self.path}, line {row.line}: this is no finding of this audit "
                    f"({about['kind']}, sample {about['sample']}, class {about['class']}); give "
                    "the decisions.csv that it wrote"
                )
            decided[number] = row.decision
        return decided


def read_decisions(path: str) -> Decisions:
    """Read what a person decided.

    Args:
        path: CSV file or URL with the columns of `IDENTITY` and `decision`; rows may be left out.

    Raises:
        UserError: it cannot be read, or a decision is neither `ACCEPT` nor `REJECT` nor empty.
    """
    rows = []
    for line, row in _decision_rows(path):
        decision = row[DECISION].strip().lower()
        if decision not in ("", ACCEPT, REJECT):
            raise UserError(
                f"{path}, line {line}: {DECISION} is {row[DECISION]!r}; write {ACCEPT} or "
                f"{REJECT}, or leave it empty"
            )
        rows.append(Decision(line, _identity([row[name] for name in IDENTITY]), decision))
    return Decisions(path, rows)


def _identities(findings: Findings) -> Iterator[tuple[Any, ...]]:
    return zip(*(findings[name].tolist() for name in IDENTITY), strict=True)


def _identity(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _decision_rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    cure = "give the decisions.csv that mhe audit wrote, with its last column filled in"
    with open_buffered(path) as stream:
        yield from read_rows(path, stream, (*IDENTITY, DECISION), cure)
