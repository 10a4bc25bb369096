"""Comparisons of made-up runs: figures, verdicts, tables, pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mhe_dist.errors import UserError
from pipelines.report.comparison import LABEL_RANKING, Claim, Outcome, Spread, VariantResult
from pipelines.report.comparison_markdown import ComparisonSection, write_comparison_page

FACES = (("easy", "Easy"), ("hard", "Hard"))
CLAIM = Claim("sampled", "full", easy="easy", points=0.3, hard="hard")


def outcome(seed: int, easy: float, hard: float) -> Outcome:
    """Rank-1 as given, TAR a tenth lower."""
    heldout = {"gallery": 2000.0, "probes": 700.0, "rank1": easy, "tar@far=1e-4": easy - 0.1}
    for name, value, probes in (("easy", easy, 500), ("hard", hard, 200)):
        heldout |= {f"{name}/rank1": value, f"{name}/tar@far=1e-4": value - 0.1}
        heldout[f"{name}/probes"] = float(probes)
    return Outcome(seed, heldout, 1234.0, 0.0125, 1.5, 2000.0, 240.0, 957, 5.0)


def compared(
    name: str, *figures: tuple[float, float], missing: tuple[int, ...] = ()
) -> VariantResult:
    outcomes = [outcome(seed, *pair) for seed, pair in enumerate(figures)]
    return VariantResult(name, name.upper(), outcomes, dict.fromkeys(missing, 0))


def test_an_outcome_is_what_the_run_left_behind() -> None:
    """Before its last resume, too."""
    summary = {
        "heldout": {"rank1": 0.5},
        "images_per_s": 800.0,  # of the last process, as its phases are
        "phases": {"train": 1.0},
        "resumed_from": "checkpoints/step_00000020",
        "steps": 30,
        "samples": 1000,
        "device": "NVIDIA H200",
    }
    records = [
        {"step": 0, "loss": 3.0},
        {"step": 9, "classes_seen": 100.0, "head_time": 0.01, "peak_rss_gib": 1.0},
        {"step": 19, "classes_seen": 200.0, "head_time": 0.09, "peak_rss_gib": 1.2},
        {"step": 29, "classes_seen": 300.0, "head_time": 0.02, "peak_rss_gib": 1.1},
        {"step": 29, "heldout/rank1": 0.5},
    ]
    for record, rate in zip(records[1:], (640.0, 64.0, 640.0), strict=False):
        record["images_per_s"] = rate
    found = Outcome.of(4, 64, summary, records)
    assert found == Outcome(
        4, {"rank1": 0.5}, 200.0, 0.02, 1.2, 160.0, 12.0, 30, 1.92, "NVIDIA H200"
    )
    assert np.isnan(Outcome.of(4, 64, summary, []).head_s)
    del summary["device"]
    assert Outcome.of(4, 64, summary, records) == found._replace(device="")


def test_a_figure_that_a_run_lacks_is_named() -> None:
    """A run whose evaluation was switched off, or that is older than the study's figure."""
    with pytest.raises(
        UserError, match=r"FULL: the run of seed 1 has no figure classification/top1"
    ):
        with_figure = outcome(0, 0.9, 0.5)
        with_figure.heldout["classification/top1"] = 0.9
        runs = [with_figure, outcome(1, 0.9, 0.5)]
        VariantResult("full", "FULL", runs).values("classification/top1")


def test_a_spread_is_the_mean_and_both_ends() -> None:
    each = compared("full", (0.9, 0.5), (0.8, 0.7))
    assert each.spread("rank1", "hard") == pytest.approx(Spread(0.6, 0.5, 0.7))
    assert each.spread("rank1") == pytest.approx(Spread(0.85, 0.8, 0.9))
    assert each.mean("head_s") == 0.0125


@pytest.mark.parametrize(
    ("mine", "easy", "hard"),
    [
        ((0.997, 0.60), "-0.30 points. At most 0.3 below: holds.", "or above: holds."),
        ((0.9969, 0.59), "-0.31 points. At most 0.3 below: does **not** hold.", "**not** hold."),
        ((1.0, 0.66), "+0.00 points. At most 0.3 below: holds.", "or above: holds, above it."),
    ],
)
def test_a_claim_is_checked_by_the_figures(mine: tuple[float, float], easy: str, hard: str) -> None:
    full = compared("full", (1.0, 0.60), (1.0, 0.65))
    found = CLAIM.verdict([compared("sampled", mine), full])
    assert found[0].endswith(easy)
    assert found[1].endswith(hard)
    assert "FULL 62.50, whose seeds lie from 60.00 to 65.00" in found[1]


@pytest.mark.parametrize(
    ("mine", "easy", "hard"),
    [
        ((0.99, 0.70), "-1.00 points. At most 1 below: holds.", "+7.50 points. At most 1"),
        ((0.98, 0.61), "-2.00 points. At most 1 below: does **not**", "-1.50 points. At most 1"),
    ],
)
def test_a_claim_is_about_tar_on_both_typefaces(
    mine: tuple[float, float], easy: str, hard: str
) -> None:
    full = compared("full", (1.0, 0.60), (1.0, 0.65))
    found = CLAIM.verdict([compared("sampled", mine), full])
    assert found[2].startswith(f"TAR, easy: SAMPLED {100 * mine[0] - 10:.2f}, FULL 90.00")
    assert easy in found[2] and found[3].startswith("TAR, hard: ") and hard in found[3]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            0.985,
            "OTHER is 1.50 points below FULL on easy: most of the difference comes from seeing",
        ),
        (
            0.995,
            "OTHER is 0.50 points below FULL on easy: seeing fewer classes does not explain most",
        ),
    ],
)
def test_a_claim_that_does_not_hold_says_whether_another_choice_loses_as_much(
    other: float, reason: str
) -> None:
    claim = CLAIM._replace(control="other")
    third, full = compared("other", (other, 0.6)), compared("full", (1.0, 0.60), (1.0, 0.65))
    sentences = claim.verdict([compared("sampled", (0.98, 0.6)), third, full])
    assert reason in sentences[4] and "1,234 with OTHER, 1,234 with SAMPLED" in sentences[4]
    assert len(claim.verdict([compared("sampled", (0.998, 0.6)), third, full])) == 4
    assert len(claim.verdict([compared("sampled", (0.98, 0.6)), compared("other"), full])) == 4


def test_a_claim_waits_for_runs() -> None:
    one = [compared("sampled", (1.0, 0.6)), compared("full", (1.0, 0.6))]
    assert CLAIM.verdict(one)[1].endswith("not decided, it takes two seeds.")
    none = [compared("sampled"), compared("full", (1.0, 0.6))]
    assert CLAIM.verdict(none) == ["Not decided yet: no run of SAMPLED is complete."]


def test_labels_are_compared_with_a_guess_of_the_most_frequent(tmp_path: Path) -> None:
    def ranked(name: str, *reached: float) -> VariantResult:
        heldout = [
            {
                "labels/samples": 4000.0,
                **{f"labels/{metric}": each for metric in ("p@1", "p@5", "psp@5")},
                **{f"labels/frequent/{metric}": 0.2 for metric in ("p@1", "p@5", "psp@5")},
            }
            for each in reached
        ]
        costs = (10.0, 0.1, 1.0, 100.0, 60.0, 9, 3.0)
        return VariantResult(
            name, name.upper(), [Outcome(seed, each, *costs) for seed, each in enumerate(heldout)]
        )

    section = ComparisonSection(
        "parts",
        "Parts",
        "What it is.",
        "mhe reproduce parts",
        [ranked("full", 0.7, 0.75), ranked("mhc", 0.5)],
        typefaces=[("labels", "labels")],
        measures=LABEL_RANKING,
    )
    write_comparison_page([section], str(tmp_path / "results.md"))
    page = (tmp_path / "results.md").read_text()
    assert rows(page)[0][3:] == ["labels: P@1", "labels: P@5", "labels: PSP@5"]
    assert rows(page)[1][3] == "72.50 (70.00 to 75.00)"
    assert "Images: 4,000 (labels)." in page
    assert (
        "P@1: the most frequent classes of the training reach 20.00 for every image. "
        "Points above that, worst seed: FULL +50.00, MHC +30.00."
    ) in page


def rows(page: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_speeds_of_two_devices_are_not_averaged(tmp_path: Path) -> None:
    """One seed on a faster machine: before, the page had the mean of both as the head's time."""
    both = compared("full", (0.99, 0.60), (0.97, 0.64), (0.98, 0.62))
    changes: tuple[dict[str, Any], ...] = (
        {"device": "A, AMX", "head_s": 0.01},
        {"device": "B, AVX2", "head_s": 0.04},
        {"device": "A, AMX", "head_s": 0.02},
    )
    outcomes = [
        each._replace(**change) for each, change in zip(both.outcomes, changes, strict=True)
    ]
    results = [replace(both, outcomes=outcomes), compared("old", (0.99, 0.60))]
    section = ComparisonSection("two", "Two", "What it is.", "mhe reproduce two", results, FACES)
    write_comparison_page([section], str(tmp_path / "results.md"))
    figures, costs = (
        (tmp_path / "results.md").read_text().split("\n## ")[1].split("\n| head | device")
    )
    assert rows(figures)[1][:4] == ["FULL", "3", "1,234", "98.00 (97.00 to 99.00)"]
    assert [row[:3] for row in rows(costs)] == [
        ["FULL", "A, AMX", "15.0"],
        ["FULL", "B, AVX2", "40.0"],
        ["OLD", "not recorded", "12.5"],
    ]


def test_the_page_has_tables_a_picture_and_what_is_missing(tmp_path: Path) -> None:
    each = [
        compared("full", (0.99, 0.60), (0.97, 0.64)),
        compared("sampled", (0.98, 0.61), missing=(1,)),
        VariantResult("third", "THIRD", [], {0: 500, 1: 0}),
    ]
    sections = [
        ComparisonSection(
            "small", "Small", "What it is.", "mhe reproduce small", each, FACES, claims=[CLAIM]
        ),
        ComparisonSection("plain", "Plain", "Without typefaces.", "mhe reproduce plain", each[:1]),
        ComparisonSection(
            "empty", "Empty", "Nothing yet.", "mhe reproduce empty", each[2:], FACES, claims=[CLAIM]
        ),
    ]
    written = write_comparison_page(sections, str(tmp_path / "results.md"))
    assert [Path(file).name for file in written.files] == [
        *("results.md", "results-small.png", "results-plain.png")
    ]
    page = (tmp_path / "results.md").read_text()
    small, plain, empty = page.split("\n## ")[1:]
    head, full, sampled, *_ = rows(small)
    assert head[:3] == ["head", "seeds", "classes seen"]
    assert head[3:] == ["Easy: rank-1", "Easy: TAR", "Hard: rank-1", "Hard: TAR"]
    assert full[:4] == ["FULL", "2", "1,234", "98.00 (97.00 to 99.00)"]
    assert sampled[3:] == ["98.00", "88.00", "61.00", "51.00"]
    assert ["FULL", "12.5", "2,000", "1.50", "957", "5.0", "4.0"] in rows(small)
    assert "Probes: 500 (Easy), 200 (Hard), against 2,000 enrolled." in small
    assert "![Small](results-small.png)" in small
    assert "At most 0.3 below: holds" in small
    assert "Not complete: SAMPLED: seed 1; THIRD: seeds 0 (at step 500), 1." in small
    assert rows(plain)[0][3:] == ["unseen typefaces: rank-1", "unseen typefaces: TAR"]
    assert "png" not in empty
    assert "|" not in empty
    with Image.open(tmp_path / "results-small.png") as picture:
        ink = (np.asarray(picture.convert("L")) < 250).mean()
        assert 0.005 < ink < 0.9
