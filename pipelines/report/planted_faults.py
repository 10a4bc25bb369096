"""Planted faults as lines of Markdown: what audits found of them, and what their cure gave back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple

from pipelines.audit.findings import DUPLICATE, FOREIGN, LEAK, MIXED, WRONG_LABEL
from pipelines.report.comparison import RANK1, VariantResult

_TITLES: Final = {
    DUPLICATE: "split classes",
    MIXED: "merged classes",
    WRONG_LABEL: "relabelled images",
    FOREIGN: "foreign images",
    LEAK: "leaked images",
    "doubted": "all images with a wrong class",
}


class AuditScores(NamedTuple):
    """The audits of a variant.

    Attributes:
        title: of the variant.
        scores: of each seed, the content of its `score.json`.
    """

    title: str
    scores: Sequence[Mapping[str, Any]]


def describe_audits(audits: Sequence[AuditScores]) -> Iterator[str]:
    """A table of precision and recall by kind; a sentence on data without planted faults."""
    planted = [each for each in audits if any("kinds" in score for score in each.scores)]
    if planted:
        yield "| audit | fault | planted | found | precision | recall |"
        yield "|---" * 6 + "|"
        for each in planted:
            for kind, title in _TITLES.items():
                found = [score["kinds"][kind] for score in each.scores]
                counts = [
                    f"{statistics.fmean(f[k] for f in found):,.0f}" for k in ("planted", "found")
                ]
                shares = [_spread([f[k] for f in found if k in f]) for k in ("precision", "recall")]
                yield f"| {' | '.join([each.title, title, *counts, *shares])} |"
        yield ""
    for each in audits:
        clean = [score["totals"] for score in each.scores if "kinds" not in score]
        if clean:
            rate = each.scores[0]["false_rate"]
            images, classes = (
                f"{_range([total[f'{what}_doubted'] for total in clean])} of {clean[0][what]:,} "
                f"{what}"
                for what in ("images", "classes")
            )
            yield (
                f"On the clean data, at a false rate of {rate:g}, {images} and {classes} are "
                "accused."
            )


def describe_recovery(
    results: Sequence[VariantResult], typefaces: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """How much of the rank-1 that the faults cost each variant has again, by typeface.

    Means over the seeds that were trained clean and dirty, and of a variant with its labels, too.

    Args:
        results: among them `clean` and `dirty`.
        typefaces: (name in the metrics, title); the name of all probes is empty.
    """
    known = [each for each in results if each.outcomes]
    for typeface, title in typefaces:
        rank1 = {each.name: _rank1_by_seed(each, typeface) for each in known}
        best, worst = rank1.pop("clean", {}), rank1.pop("dirty", {})
        said = []
        for each in known:
            seeds = best.keys() & worst.keys() & rank1.get(each.name, {}).keys()
            if seeds:
                gained = _mean_gain(rank1[each.name], worst, seeds)
                said.append(f"{each.title} {_recovered(gained, _mean_gain(best, worst, seeds))}")
        if said:
            cost = 100 * _mean_gain(best, worst, best.keys() & worst.keys())
            said_of_all = f"the faults cost {cost:.2f} points of rank-1; of these are back"
            yield f"- {title}: {said_of_all}: {'; '.join(said)}"


def _rank1_by_seed(result: VariantResult, typeface: str) -> dict[int, float]:
    seeds = [outcome.seed for outcome in result.outcomes]
    return dict(zip(seeds, result.values(RANK1, typeface), strict=True))


def _mean_gain(over: dict[int, float], under: dict[int, float], seeds: Set[int]) -> float:
    return statistics.fmean(over[seed] - under[seed] for seed in seeds)


def _recovered(gained: float, cost: float) -> str:
    points = f"{100 * gained:+.2f} points"
    if cost <= 0:
        return points
    share = f"{gained / cost:.0%}" if gained > 0 else "nothing"
    return f"{share} ({points})"


def _spread(shares: Sequence[float]) -> str:
    """In percent: the mean, and the range if there are several."""
    if not shares:
        return "none"
    mean, low, high = (100 * f(shares) for f in (statistics.fmean, min, max))
    return f"{mean:.1f}" if len(shares) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
