"""Precision and recall of findings against a plan, by hand."""

from __future__ import annotations

import math

import pyarrow as pa

from pipelines.sources.planted.score import KindScore, score_findings

PLAN = {
    "kind": ["split", "split", "merged", "relabelled", "relabelled", "foreign", "leak"],
    "sample": [-1, -1, -1, 10, 11, 100, 101],
    "planted_class": [0, 1, 2, 5, 6, 7, 8],
    "second_planted_class": [20, 21, -1, 3, 4, -1, -1],
}


def findings(*rows: tuple[str, int, int, int]) -> pa.Table:
    names = ("kind", "sample", "class", "neighbour_class")
    return pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)})


def test_pairs_count_in_either_order_and_once() -> None:
    found = findings(
        ("duplicate_classes", -1, 20, 0),
        ("duplicate_classes", -1, 0, 20),
        ("duplicate_classes", -1, 1, 9),
    )
    score = score_findings(found, PLAN)["duplicate_classes"]
    assert score == KindScore(planted=2, found=2, right=1, recalled=1)
    assert (score.precision, score.recall) == (0.5, 0.5)


def test_a_mixed_class_counts_once_however_many_of_its_images_are_named() -> None:
    found = findings(
        ("mixed_class", 1, 2, -1), ("mixed_class", 2, 2, -1), ("mixed_class", 3, 9, -1)
    )
    assert score_findings(found, PLAN)["mixed_class"] == KindScore(1, 2, 1, 1)


def test_a_stranger_taken_for_a_wrong_label_is_no_relabelled_image_but_rightly_doubted() -> None:
    scores = score_findings(findings(("wrong_label", 10, 5, 3), ("wrong_label", 100, 7, 3)), PLAN)
    assert scores["wrong_label"] == KindScore(2, 2, 1, 1)
    assert scores["doubted"] == KindScore(planted=4, found=2, right=2, recalled=2)


def test_a_copy_of_a_heldout_image_is_foreign_too_but_recall_counts_strangers() -> None:
    found = findings(("foreign", 100, 7, -1), ("foreign", 101, 8, -1), ("foreign", 10, 5, -1))
    score = score_findings(found, PLAN)["foreign"]
    assert score == KindScore(planted=1, found=3, right=2, recalled=1)
    assert score.recall == 1.0


def test_leaks_are_images_and_those_of_identities_are_not_counted() -> None:
    found = findings(("leak", 101, 8, -1), ("leak", -1, 8, -1), ("leak", 12, 8, -1))
    assert score_findings(found, PLAN)["leak"] == KindScore(1, 2, 1, 1)


def test_nothing_found_has_a_recall_and_no_precision() -> None:
    score = score_findings(findings(), PLAN)["wrong_label"]
    assert score.recall == 0.0 and math.isnan(score.precision)
    assert score.as_dict() == {"planted": 2, "found": 0, "right": 0, "recalled": 0, "recall": 0.0}
