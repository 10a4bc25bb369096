"""How far the rule behind `auto` ranks the heads of a study as they were measured.

    python tools/head_ranking.py results

For docs/choosing.md: the runs of `mhe reproduce heads` and `heads_once`, with their settings alone
as `mhe_dist/config/auto/head_score.py` scores them, beside rank-1 of unseen classes in the easy
typeface and in the hard one, and Spearman's correlation of both.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import yaml
from torchmetrics.functional import spearman_corrcoef

from mhe_dist.config.auto.head_score import score_head
from mhe_dist.config.auto.head_sizes import demand_of
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config

RUNS: Final = re.compile(r"heads(?:_once)?-(\w+)-seed\d+")
MEASURED: Final = ("wenkai/rank1", "brush/rank1", "wenkai/tar@far=1e-4", "brush/tar@far=1e-4")


class ScoredHead(NamedTuple):
    """A head, or a run of one.

    Attributes:
        name: of the variant of the study.
        score: of its settings.
        runs: how many `figures` are the mean of.
        figures: those of `MEASURED`, in percent.
    """

    name: str
    score: float
    runs: int
    figures: tuple[float, ...]


class KeptRun(NamedTuple):
    """A run of the two studies in a folder of results.

    Attributes:
        head: name of the variant of the study.
        config: of the run.
        summary: what it came to.
    """

    head: str
    config: Config
    summary: dict[str, Any]


def kept_runs(folder: Path) -> Iterator[KeptRun]:
    """Every run of the two studies in a folder of results."""
    for run in sorted(folder.iterdir()):
        if fits := RUNS.fullmatch(run.name):
            settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            yield KeptRun(fits[1], stored_config(settings), summary)


def scored_runs(folder: Path) -> list[ScoredHead]:
    """The same, scored."""
    found = []
    for head, config, summary in kept_runs(folder):
        score = score_head(config.head, demand_of(config, summary["classes"]))
        figures = tuple(100 * summary["heldout"][name] for name in MEASURED)
        found.append(ScoredHead(head, score, 1, figures))
    return found


def mean_by_head(runs: Sequence[ScoredHead]) -> list[ScoredHead]:
    """The heads with their means over the seeds, the best score first."""
    heads: dict[str, list[ScoredHead]] = {}
    for run in runs:
        heads.setdefault(run.name, []).append(run)
    means = [
        ScoredHead(
            name,
            same[0].score,
            len(same),
            tuple(
                sum(column) / len(same) for column in zip(*(r.figures for r in same), strict=True)
            ),
        )
        for name, same in heads.items()
    ]
    return sorted(means, key=lambda head: -head.score)


def correlations(heads: Sequence[ScoredHead]) -> list[float]:
    """Spearman's correlation of the scores with each of `MEASURED`; equal scores share a rank."""
    scores = torch.tensor([head.score for head in heads], dtype=torch.float64)
    figures = torch.tensor([head.figures for head in heads], dtype=torch.float64)
    return [spearman_corrcoef(scores, column).item() for column in figures.T]


def table(runs: Sequence[ScoredHead]) -> str:
    """The table of docs/choosing.md."""
    heads = mean_by_head(runs)
    lines = ["| head | score | easy: rank-1, TAR | hard: rank-1, TAR |", "|---|---|---|---|"]
    for name, score, _, (easy, hard, easy_tar, hard_tar) in heads:
        cells = (f"`{name}`", f"{score:.2f}", f"{easy:.1f}, {easy_tar:.1f}")
        lines.append(f"| {' | '.join(cells)} | {hard:.1f}, {hard_tar:.1f} |")
    for title, compared in ((f"{len(heads)} heads", heads), (f"{len(runs)} runs", runs)):
        easy, hard, easy_tar, hard_tar = correlations(compared)
        found = f"{easy:.2f}, {easy_tar:.2f} | {hard:.2f}, {hard_tar:.2f}"
        lines.append(f"| Spearman, {title} | | {found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(scored_runs(Path(sys.argv[1]))))
