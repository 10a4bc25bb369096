"""Sections of a page about held-out classes: mistakes by name and image, a map, accuracy by class.

They show what the evaluation kept (`pipelines.evaluate.metrics.hard_cases`, `projection`). An
evaluation of before these has the nearest neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Final

import numpy as np

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.data.mixture.class_list import names_of
from pipelines.report.charts.chart import BarChart, PointMap
from pipelines.report.charts.counts import draw_bars, draw_points
from pipelines.report.page import ImageCard, ImageRow, PageSection
from pipelines.report.plots import Arrays
from pipelines.report.sheets.pictures import Pictures, as_data_url, has_index

_SIDE: Final = 80  # pixels of an image
_QUALITY: Final = 75  # of its JPEG
_PROBES: Final = 6  # drawn at random, and again of the mistakes
_CLASS_KEYS: Final = ("confused", "genuine_classes", "impostor_classes", "map_classes")
_BINS: Final = tuple(f"{10 * tenth}%" for tenth in range(11))


def heldout_sections(details: Arrays, shards: str) -> Iterator[PageSection]:
    """The sections that the kept arrays allow.

    Args:
        details: of the evaluation (`heldout.Evaluation.details`).
        shards: the held-out set, which has the images; without it names stand alone.
    """
    there = has_index(shards)
    names = _Names(details, shards if there else "")
    images = _Images(shards if there else "")
    yield from _classes_section(details, names)
    yield from _confused_section(details, names, images)
    yield from _pairs_sections(details, names, images)
    if there:
        yield from _neighbour_sections(details, images)


class _Names:
    """Names of the classes that a page shows; `class 7` for one without."""

    def __init__(self, details: Arrays, shards: str) -> None:
        shown = {
            int(each) for key in _CLASS_KEYS if key in details for each in np.ravel(details[key])
        }
        self._names = names_of(shards, shown) if shards else {}

    def of(self, number: Any) -> str:
        """The name of a class."""
        return self._names.get(int(number), f"class {int(number)}")


class _Images:
    """Images of the held-out set as a page holds them, each read once."""

    def __init__(self, shards: str) -> None:
        self._pictures = Pictures(shards, [], _SIDE) if shards else None
        self.url = cache(self._url)

    def _url(self, number: int) -> str:
        if self._pictures is None:
            return ""
        return as_data_url(self._pictures.read(number), _QUALITY)


def _classes_section(details: Arrays, names: _Names) -> Iterator[PageSection]:
    charts = []
    if "class_accuracy" in details:
        counts = details["class_accuracy"]
        whole = counts[-1] / max(1, counts.sum())
        note = (
            f"Of {counts.sum():,} classes, {whole:.2%} have all their probes found at rank 1. "
            "A bar holds the classes from its share up to the next."
        )
        title = "Accuracy by class"
        bars = BarChart(title, "probes found", "classes", _BINS, counts, note)
        charts.append(draw_bars(bars))
    if "map_points" in details:
        classes, points = details["map_classes"], details["map_points"]
        groups = [(names.of(each), points[classes == each]) for each in np.unique(classes)]
        note = f"{len(groups)} classes drawn at random. {str(details['map_method']).capitalize()}."
        charts.append(draw_points(PointMap("Map of embeddings", groups, note)))
    if charts:
        text = "How the classes differ, at the last evaluation"
        yield PageSection("Unseen classes, one by one", text, charts)


def _confused_section(details: Arrays, names: _Names, images: _Images) -> Iterator[PageSection]:
    if "confused" not in details:
        return
    text = "A probe, and the entry of another class that it was taken for: the clearest mistake"
    rows = []
    for classes, (count, every), numbers in zip(
        details["confused"], details["confused_counts"], details["confused_images"], strict=True
    ):
        said = f"{count:,} of the {every:,} probes of the two classes"
        cards = _pair(numbers, classes, names, images, ("probe", "taken for"))
        rows.append(ImageRow(cards, said))
    none = "No probe is nearer to another class than to its own."
    yield PageSection("Most confused classes", text if rows else none, image_rows=rows)


def _pairs_sections(details: Arrays, names: _Names, images: _Images) -> Iterator[PageSection]:
    for kind, title, text in (
        (
            "genuine",
            "Hardest genuine pairs",
            "Probe and gallery entry of one class with the lowest cosine, one pair of a class",
        ),
        (
            "impostor",
            "Hardest impostor pairs",
            "Probe and gallery entry of two classes with the highest cosine, one pair of the two",
        ),
    ):
        if f"{kind}_pairs" not in details:
            continue
        found = (details[f"{kind}_{part}"] for part in ("pairs", "classes", "scores"))
        rows = [
            ImageRow(
                _pair(numbers, classes, names, images, ("probe", "gallery")), f"cosine {score:.3f}"
            )
            for numbers, classes, score in zip(*found, strict=True)
        ]
        if rows:
            yield PageSection(title, text, image_rows=rows)


def _pair(
    numbers: Iterable[Any],
    classes: Iterable[Any],
    names: _Names,
    images: _Images,
    notes: tuple[str, str],
) -> list[ImageCard]:
    return [
        ImageCard(images.url(int(number)), names.of(each), note)
        for number, each, note in zip(numbers, classes, notes, strict=True)
    ]


def _neighbour_sections(details: Arrays, images: _Images) -> Iterator[PageSection]:
    if "nearest" not in details:
        return
    right = details["right"]
    groups = {
        "Nearest neighbours": np.arange(len(right)),
        "Nearest neighbours of mistakes": np.flatnonzero(~right[:, 0]),
    }
    for title, numbers in groups.items():
        if not len(numbers):
            continue
        rng = generator(0, f"page/{title}")
        drawn = sample_without_replacement(len(numbers), min(_PROBES, len(numbers)), rng)
        rows = [_neighbours(details, int(probe), images) for probe in numbers[drawn]]
        text = (
            "A probe drawn at random, and the gallery's nearest entries; green: of its class, "
            "red: of another and nearer than that"
        )
        yield PageSection(title, text, image_rows=rows)


def _neighbours(details: Arrays, probe: int, images: _Images) -> ImageRow:
    cards = [ImageCard(images.url(int(details["probes"][probe])), "probe")]
    mark = "wrong"
    for rank, (number, is_right) in enumerate(
        zip(details["nearest"][probe], details["right"][probe], strict=True), 1
    ):
        shown = "right" if is_right else mark
        mark = "" if is_right else mark
        cards.append(ImageCard(images.url(int(number)), f"{rank}.", _MARKS[shown], shown))
    return ImageRow(cards)


_MARKS: Final = {"right": "its class", "wrong": "another", "": "another"}
