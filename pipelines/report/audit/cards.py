"""A finding as a card of the page: groups of pictures with names under them, and what is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pipelines.audit.findings import DUPLICATE, LEAK, MIXED, REPEATED, WRONG_LABEL
from pipelines.report.audit.findings import (
    AuditFindings,
    ClassMembers,
    Kind,
    Row,
    short_name,
)
from pipelines.report.sheets.pictures import Pictures, as_data_url
from pipelines.storage.csv_table import as_cell, spell_out

_BESIDE: Final = 4  # images of a class beside a stray one
_OF_PAIR: Final = 6  # images of each class of a pair, and of each part of a class
_SIDE: Final = 96  # of a picture in pixels
_QUALITY: Final = 80


@dataclass(frozen=True)
class CardPicture:
    """A picture: its URL, and its name below it."""

    url: str
    name: str


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that belong together.

    Attributes:
        title: above them.
        note: behind the title.
        pictures: side by side.
        mark: `subject`, what the finding is about, or empty.
    """

    title: str
    note: str
    pictures: Sequence[CardPicture]
    mark: str = ""


@dataclass(frozen=True)
class FindingCard:
    """A finding.

    Attributes:
        title: which class or image.
        certainty: how sure the audit is, as text.
        groups: of pictures.
        rows: of the table, as the download writes them.
        note: more about it.
    """

    title: str
    certainty: str
    groups: Sequence[PictureGroup]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    note: str = ""


class CardMaker:
    """Makes the cards of findings; it reads the pictures that they show."""

    def __init__(
        self,
        findings: AuditFindings,
        members: ClassMembers,
        source: str,
        sets: Mapping[str, str],
    ) -> None:
        """Open the data.

        Args:
            findings: what was found.
            members: images of the classes that are shown.
            source: shards of the data set.
            sets: shards of the evaluation sets, by the name that was given for `neighbour_set`.
        """
        self._columns, self._members = findings.columns, members
        self._own = Pictures(source, (), _SIDE)
        self._sets = {spell_out(name): Pictures(url, (), _SIDE) for name, url in sets.items()}
        self._made: dict[tuple[str, int], CardPicture] = {}

    def cards(self, kind: Kind) -> Iterator[FindingCard]:
        """A card for each finding of a kind that is shown."""
        for rows in kind.shown:
            first = rows[0]
            if kind.name == MIXED:
                groups = list(self._parts(rows))
                title = first["class_name"]
            elif kind.name == DUPLICATE:
                groups = list(self._pair_of_classes(first))
                title = f"{first['class_name']} and {first['neighbour_name']}"
            elif first["sample"] < 0:
                groups, title = list(self._identity_leak(first)), first["class_name"]
            elif kind.name in (REPEATED, LEAK):
                groups, title = list(self._pair_of_images(first)), first["key"]
            else:
                groups, title = list(self._stray(first)), first["key"]
            yield FindingCard(
                title,
                _certainty(first),
                groups,
                [self._cells(row) for row in rows],
                _note(kind, rows),
            )

    def _cells(self, row: Row) -> list[str]:
        return ["" if row[name] is None else as_cell(row[name]) for name in self._columns]

    def _picture(self, number: int, of_set: str = "", name: str = "") -> CardPicture:
        if (of_set, number) not in self._made:
            source = self._sets.get(of_set) if of_set else self._own
            if source is None or number < 0:
                return CardPicture("", name)
            key, pixels = source.read_named(number)
            self._made[of_set, number] = CardPicture(as_data_url(pixels, _QUALITY), key)
        return self._made[of_set, number]

    def _class(
        self, number: int, name: str, count: int, title: str, without: Sequence[int] = ()
    ) -> PictureGroup:
        """Images of a class."""
        pictures = [self._picture(row) for row in self._members.of(number, count, without)]
        size = self._members.sizes.get(number, 0)
        note = f"{size:,} image{'' if size == 1 else 's'}" if size else ""
        return PictureGroup(f"{title}{name}", note, pictures)

    def _pair_of_classes(self, row: Row) -> Iterator[PictureGroup]:
        yield self._class(row["class"], row["class_name"], _OF_PAIR, "")
        yield self._class(row["neighbour_class"], row["neighbour_name"], _OF_PAIR, "")

    def _parts(self, rows: Sequence[Row]) -> Iterator[PictureGroup]:
        number, moved = rows[0]["class"], [row["sample"] for row in rows]
        pictures = [self._picture(row) for row in self._members.of(number, _OF_PAIR, moved)]
        rest = max(0, self._members.sizes.get(number, 0) - len(moved))
        yield PictureGroup("Stays", f"{rest:,} images" if rest else "", pictures)
        parts: dict[int, list[int]] = {}
        for row in rows:
            parts.setdefault(row["group"], []).append(row["sample"])
        for position, samples in enumerate(parts.values(), 1):
            title = "Further part" if len(parts) == 1 else f"Further part {position}"
            pictures = [self._picture(sample) for sample in samples[:_OF_PAIR]]
            note = f"{len(samples):,} image{'' if len(samples) == 1 else 's'}"
            yield PictureGroup(title, note, pictures, "subject")

    def _stray(self, row: Row) -> Iterator[PictureGroup]:
        picture = self._picture(row["sample"])
        yield PictureGroup("The image", "", [picture], "subject")
        yield self._class(row["class"], row["class_name"], _BESIDE, "Its class: ", [row["sample"]])
        if row["neighbour_class"] >= 0:
            title = "Nearest class: " if row["kind"] != WRONG_LABEL else "Goes to: "
            yield self._class(row["neighbour_class"], row["neighbour_name"], _BESIDE, title)

    def _pair_of_images(self, row: Row) -> Iterator[PictureGroup]:
        where = row["neighbour_set"] or ""
        yield PictureGroup(row["class_name"], "", [self._picture(row["sample"])], "subject")
        other = self._picture(row["neighbour_sample"], where, row["neighbour_key"])
        yield PictureGroup(short_name(where) or row["neighbour_name"], "", [other])

    def _identity_leak(self, row: Row) -> Iterator[PictureGroup]:
        yield self._class(row["class"], row["class_name"], _OF_PAIR, "Trained on: ")
        where = short_name(row["neighbour_set"]) or "evaluation set"
        pictures = [self._picture(row["neighbour_sample"], row["neighbour_set"] or "")]
        shown = pictures if row["neighbour_sample"] >= 0 else []
        yield PictureGroup(f"{where}: {row['neighbour_key'] or row['neighbour_name']}", "", shown)


def _certainty(row: Row) -> str:
    return f"{min(row['probability'], 0.9999):.2%} sure" if row["probability"] >= 0 else ""


def _note(kind: Kind, rows: Sequence[Row]) -> str:
    """What the pictures do not say."""
    row = rows[0]
    said = f"score {row['score']:.3g}"
    if kind.name == DUPLICATE and row["group"] >= 0:
        said += f"; component {row['group']}"
    return said
