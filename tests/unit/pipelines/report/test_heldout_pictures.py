"""What a page shows of held-out classes: by name, with images where the set is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report.heldout_pictures import heldout_sections
from tests.support import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("heldout")
    found = tiny.write_shards(folder, classes=5)
    Path(found, "classes.tsv").write_text("class\tname\n0\tAnna\n1\tBert\n2\tCem\n")
    return found


DETAILS: dict[str, Any] = {
    "probes": np.arange(3),
    "nearest": np.arange(9).reshape(3, 3),
    "right": np.array([[True, False, True], [False, True, False], [False, False, False]]),
    "class_accuracy": np.array([1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]),
    "confused": np.array([[1, 0], [2, 4]]),
    "confused_counts": np.array([[3, 1200], [1, 7]]),
    "confused_images": np.array([[0, 5], [7, 2]]),
    "genuine_pairs": np.array([[0, 5]]),
    "genuine_classes": np.array([[1, 1]]),
    "genuine_scores": np.array([0.125]),
    "impostor_pairs": np.array([[0, 6]]),
    "impostor_classes": np.array([[1, 2]]),
    "impostor_scores": np.array([0.875]),
    "map_classes": np.array([0, 0, 2]),
    "map_points": np.array([[0, 0], [1, 2], [3, 1]], np.float32),
    "map_images": np.arange(3),
    "map_method": np.array("the first two principal components, 71% of the variance"),
}


def test_mistakes_are_shown_by_name_and_image(shards: str) -> None:
    sections = {section.title: section for section in heldout_sections(DETAILS, shards)}
    assert list(sections) == [
        "Unseen classes, one by one",
        "Most confused classes",
        "Hardest genuine pairs",
        "Hardest impostor pairs",
        "Nearest neighbours",
        "Nearest neighbours of mistakes",
    ]
    first, second = sections["Most confused classes"].image_rows
    assert [(card.name, card.note) for card in first.cards] == [
        ("Bert", "probe"),
        ("Anna", "taken for"),
    ]
    assert first.text == "3 of the 1,200 probes of the two classes"
    assert second.cards[1].name == "class 4"  # which has no name
    (pair,) = sections["Hardest impostor pairs"].image_rows
    assert pair.text == "cosine 0.875"
    urls = {card.url for row in (first, second, pair) for card in row.cards}
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    assert len(urls) == 5  # image 0 is shown twice


def test_neighbours_are_right_or_nearer_than_right(shards: str) -> None:
    *_, every, mistakes = heldout_sections(DETAILS, shards)
    marks = [[card.mark for card in row.cards[1:]] for row in every.image_rows]
    assert marks == [["right", "", "right"], ["wrong", "right", ""], ["wrong"] * 3]
    assert len(mistakes.image_rows) == 2


def test_charts_say_what_they_show(shards: str) -> None:
    bars, points = next(heldout_sections(DETAILS, shards)).charts
    assert "Of 4 classes, 25.00% have all their probes found" in bars.note
    assert "Anna: 2 images" in points.svg and "Cem: 1 image" in points.svg
    assert points.note.endswith("The first two principal components, 71% of the variance.")


def test_without_the_set_there_are_names_alone() -> None:
    *_, genuine, impostor = heldout_sections(DETAILS, "/nowhere/heldout")
    assert impostor.title == "Hardest impostor pairs"
    assert [card.url for card in genuine.image_rows[0].cards] == ["", ""]
    assert genuine.image_rows[0].cards[0].name == "class 1"


def test_runs_of_before_have_neighbours_or_nothing(shards: str) -> None:
    old = {key: DETAILS[key] for key in ("probes", "nearest", "right")}
    titles = [section.title for section in heldout_sections(old, shards)]
    assert titles == ["Nearest neighbours", "Nearest neighbours of mistakes"]
    assert list(heldout_sections(old, "")) == list(heldout_sections({}, shards)) == []


def test_a_perfect_model_is_said_to_be_one(shards: str) -> None:
    none = {"confused": np.zeros((0, 2)), "confused_counts": np.zeros((0, 2))}
    (section,) = heldout_sections(none | {"confused_images": np.zeros((0, 2))}, shards)
    assert section.text == "No probe is nearer to another class than to its own."
