"""The score of a head's settings ranks heads as far as docs/choosing.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.reproduce.studies import FULL, PAPER, SMALL, Study
from mhe_dist.config.auto.head_score import score_head
from mhe_dist.config.auto.head_sizes import (
    HeadDemand,
    count_classes_met,
    demand_of,
    resolve_sizes,
)
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from tools.head_ranking import ScoredHead, correlations, mean_by_head, scored_runs, table

ROOT = Path(__file__).parents[5]
CHOOSING = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RUNS = scored_runs(ROOT / "results")


def test_the_page_shows_the_ranking_of_the_kept_runs() -> None:
    assert (len(RUNS), len(mean_by_head(RUNS))) == (23, 11)
    assert table(RUNS) in CHOOSING, "run: python tools/head_ranking.py results"


def test_heads_are_ranked_as_measured_but_for_rank_1_of_the_hard_typeface() -> None:
    easy, hard, easy_tar, hard_tar = correlations(mean_by_head(RUNS))
    assert min(easy, easy_tar, hard_tar) >= 0.8
    assert 0.6 < hard < 0.8, "now the page may say otherwise"


def test_the_page_says_where_it_fails() -> None:
    rows = [head for head in mean_by_head(RUNS) if head.name not in ("mhp", "mhc")]
    easy, hard, *_ = correlations(rows)
    assert f"{easy:.2f} and {hard:.2f}" in CHOOSING
    by_name = {head.name: head for head in rows}
    assert rows[1].name == "mhs_batch"
    hard_figures = sorted((head.figures[1] for head in rows), reverse=True)
    assert hard_figures.index(by_name["mhs_batch"].figures[1]) + 1 == 8, "second by its score"


def measured(study: Study) -> dict[str, tuple[float, ...]]:
    """Rank-1 and TAR of each head of a study, in docs/results.md."""
    section = RESULTS.partition(f"\n## {study.title}\n")[2].partition("\n## ")[0]
    first = section.partition("\n| head | head, ms")[0]
    rows = re.findall(r"^\| (.+?) \| \d+ \| [\d,]+ \| (.*) \|$", first, re.MULTILINE)
    return {
        title: tuple(float(cell.split()[0]) for cell in cells.split(" | ")) for title, cells in rows
    }


@pytest.mark.parametrize(
    ("study", "classes", "compared"),
    [(SMALL, 6_000, (0, 2)), (PAPER, 100, (0, 1)), (FULL, 93_966, (0, 2))],
    ids=["small", "paper", "full"],
)
def test_the_page_says_how_far_it_holds_in_other_studies(
    study: Study, classes: int, compared: tuple[int, int]
) -> None:
    """Rank-1 of both typefaces, or rank-1 and TAR."""
    figures, heads = measured(study), []
    for variant in study.variants:
        config = load_config(study.config, variant.overrides)
        score = score_head(config.head, demand_of(config, classes))
        heads.append(ScoredHead(variant.name, score, study.seeds, figures[variant.title]))
    found = correlations(heads)
    assert " and ".join(f"{found[number]:.2f}" for number in compared) in CHOOSING
    if study is PAPER:
        assert f"it says nothing ({found[2]:.2f})" in CHOOSING  # top-1 of the training's classes


def test_what_a_score_counts() -> None:
    demand = HeadDemand(6_000, 128, 2, 256, 2, gpu=False)

    def score(**head: object) -> float:
        return score_head(HeadConfig.model_validate({"groups": 2} | head), demand)

    def mhs(length: int, extra: int, **block: object) -> float:
        return score(mhs={"length": length, "extra_heads": extra, **block})

    assert score(kind="full") == pytest.approx(4.278, abs=1e-3)
    assert score(kind="mhp") < score(kind="mhc") < mhs(25, 0, negatives="own")
    assert (
        mhs(600, 0, negatives="own") > mhs(100, 5) > mhs(100, 2)
    )  # the same classes, all returning
    assert mhs(100, 5) > score(kind="partial_fc", partial_fc={"rate": 0.1})
    fixed, moving = (mhs(100, 0, negatives="own", repartition_every=n) for n in (0, 1))
    assert fixed > moving
    assert mhs(10, 0, exchange="gather", negatives="batch") < score(kind="full")


@pytest.mark.parametrize("classes", [6_000, 94_000, 10**6])
def test_the_rule_takes_what_ranks_best_among_heads_that_meet_as_many(classes: int) -> None:
    values = {
        "data": {"shards": "x"},
        "model": {"embedding_dim": 128},
        "train": {"global_batch": 512, "micro_batch": 256},
        "scale": {"workers": 2},
    }
    config = Config.model_validate(values)
    demand = demand_of(config, classes)
    chosen = resolve_sizes(config, classes).head
    share = count_classes_met(chosen.mhs, demand, chosen.chosen_groups) / classes
    others = [
        {"kind": "partial_fc", "partial_fc": {"rate": share}},
        {"mhs": {"length": 20, "extra_heads": int(share * classes / 20) - 1}},
    ]
    for other in others:
        head = HeadConfig.model_validate({"groups": 2} | other)
        assert score_head(chosen, demand) >= score_head(head, demand)
