"""Planted faults as lines of Markdown: what audits found of them, and what their cure gave back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pipelines.report.comparison import RANK1, VariantResult

_TITLES: Final = {
    "duplicate_classes": "split classes",
    "mixed_class": "merged classes",
    "wrong_label": "relabelled images",
    "foreign": "foreign images",
    "leak": "leaked images",
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
                _spread([total[f"{what}_doubted"] / total[what] for total in clean])
                for what in ("images", "classes")
            )
            yield (
                f"On the clean data, at a false rate of {rate:g}, {images} % of the images and "
                f"{classes} % of the classes are accused."
            )


def describe_recovery(
    results: Sequence[VariantResult], typefaces: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """How much of the rank-1 that the faults cost each variant has again, by typeface.

    Args:
        results: among them `clean` and `dirty`.
        typefaces: (name in the metrics, title).
    """
    known = {each.name: each for each in results if each.outcomes}
    if not {"clean", "dirty"} <= known.keys():
        return
    for name, title in typefaces:
        best, worst = (known[each].spread(RANK1, name).mean for each in ("clean", "dirty"))
        others = [each for each in known.values() if each.name not in ("clean", "dirty")]
        said = [f"{each.title} {_recovered(each, name, best, worst)}" for each in others]
        if said:
            cost = f"{title}: the faults cost {100 * (best - worst):.2f} points of rank-1"
            yield f"- {cost}; of these are back: {'; '.join(said)}"


def _recovered(each: VariantResult, typeface: str, best: float, worst: float) -> str:
    gained = each.spread(RANK1, typeface).mean - worst
    points = f"{100 * gained:+.2f} points"
    if best <= worst:
        return points
    share = f"{gained / (best - worst):.0%}" if gained > 0 else "nothing"
    return f"{share} ({points})"


def _spread(shares: Sequence[float]) -> str:
    """In percent: the mean, and the range if there are several."""
    if not shares:
        return "none"
    mean, low, high = (100 * f(shares) for f in (statistics.fmean, min, max))
    return f"{mean:.1f}" if len(shares) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"
