"""What a page says of planted faults: precision and recall, and what the cure gave back."""

from __future__ import annotations

from typing import Any

from pipelines.report.comparison import Outcome, VariantResult
from pipelines.report.planted_faults import AuditScores, describe_audits, describe_recovery
from pipelines.sources.planted.score import KindScore, score_findings

COLUMNS = (
    *("kind", "sample", "class", "neighbour_class"),
    *("planted_class", "second_planted_class"),
)
KINDS = list(score_findings(*[dict.fromkeys(COLUMNS, ())] * 2))
TOTALS = {"images": 1000, "classes": 50, "images_doubted": 9, "classes_doubted": 1}


def score(recalled: int, found: int = 100) -> dict[str, Any]:
    one = KindScore(planted=100, found=found, right=min(found, 95), recalled=recalled).as_dict()
    return {"false_rate": 0.01, "totals": TOTALS, "kinds": dict.fromkeys(KINDS, one)}


def test_precision_and_recall_are_means_over_the_seeds_with_their_range() -> None:
    lines = list(describe_audits([AuditScores("once", [score(90), score(80)])]))
    assert (
        "| once | relabelled images | 100 | 100 | 95.0 (95.0 to 95.0) | 85.0 (80.0 to 90.0) |"
        in lines
    )
    assert len(lines) == 2 + len(KINDS) + 1


def test_what_was_never_found_has_no_precision() -> None:
    lines = list(describe_audits([AuditScores("once", [score(0, found=0)])]))
    assert "| once | split classes | 100 | 0 | none | 0.0 |" in lines


def test_data_without_planted_faults_says_how_much_is_accused() -> None:
    """Shares in percent were 0.0 for anything below one in 2,000."""
    clean = [{"false_rate": 0.01, "totals": {**TOTALS, "images_doubted": n}} for n in (9, 0, 4)]
    (line,) = describe_audits([AuditScores("clean", clean)])
    assert "at a false rate of 0.01, 0 to 9 of 1,000 images and 1 of 50 classes are" in line


def result(name: str, *rank1: float) -> VariantResult:
    """With a run of each seed from 0 on."""
    outcomes = [
        Outcome(seed, {"easy/rank1": value}, 1, 1, 1, 1, 1, 1, 1)
        for seed, value in enumerate(rank1)
    ]
    return VariantResult(name, f"the {name}", outcomes)


def test_what_is_back_is_a_share_of_what_the_faults_cost() -> None:
    results = [result("clean", 0.9), result("dirty", 0.8), result("audited1", 0.875)]
    (line,) = describe_recovery(results, [("easy", "Easy")])
    said = "the faults cost 10.00 points of rank-1; of these are back: the audited1"
    assert line == f"- Easy: {said} 75% (+7.50 points)"


def test_only_seeds_are_compared_that_were_trained_in_each_way() -> None:
    results = [result("clean", 0.9), result("dirty", 0.8, 0.7), result("audited1", 0.875, 0.6)]
    (line,) = describe_recovery(results, [("easy", "Easy")])
    assert "cost 10.00 points" in line and line.endswith("the audited1 75% (+7.50 points)")


def test_nothing_is_said_of_what_is_back_where_the_faults_cost_nothing_or_are_not_known() -> None:
    results = [result("clean", 0.8), result("dirty", 0.8), result("audited1", 0.81)]
    (line,) = describe_recovery(results, [("easy", "Easy")])
    assert line.endswith("the audited1 +1.00 points")
    assert list(describe_recovery(results[1:], [("easy", "Easy")])) == []


def test_a_variant_that_is_worse_than_the_dirty_one_gave_nothing_back() -> None:
    results = [result("clean", 0.9), result("dirty", 0.8), result("filter", 0.78)]
    (line,) = describe_recovery(results, [("easy", "Easy")])
    assert line.endswith("the filter nothing (-2.00 points)")
