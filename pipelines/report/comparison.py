"""Runs that differ in one thing, several seeds each: what they reached, and what follows. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines.evaluate.metrics.roc import far_name

RANK1, TAR = "rank1", far_name(1e-4)


class Outcome(NamedTuple):
    """What a complete run reached.

    Attributes:
        seed: of the run.
        heldout: metrics of its last evaluation, by name.
        classes_seen: classes in the softmax of a sample, mean over the run.
        head_s: seconds of a step in the head, median over the run.
        memory_gib: largest resident memory of a worker.
        images_per_s: over all workers, while training.
        train_s: seconds of training, of the last process if it was resumed.
        steps, epochs: how far it went.
    """

    seed: int
    heldout: dict[str, float]
    classes_seen: float
    head_s: float
    memory_gib: float
    images_per_s: float
    train_s: float
    steps: int
    epochs: float

    @classmethod
    def of(
        cls, seed: int, batch: int, summary: dict[str, Any], records: Sequence[dict[str, Any]]
    ) -> Outcome:
        """From what a run leaves behind.

        Args:
            seed: of the run.
            batch: images per step.
            summary: its `summary.json`.
            records: the lines of its `metrics.jsonl`.
        """

        def series(name: str) -> list[float]:
            return [record[name] for record in records if name in record] or [float("nan")]

        return cls(
            seed,
            summary["heldout"],
            statistics.fmean(series("classes_seen")),
            statistics.median(series("head_time")),
            max(series("peak_rss_gib")),
            summary["images_per_s"],
            summary["phases"].get("train", 0.0),
            summary["steps"],
            summary["steps"] * batch / summary["samples"],
        )


class Spread(NamedTuple):
    """A figure over seeds: its mean, and the lowest and highest one."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(statistics.fmean(values), min(values), max(values))


@dataclass(frozen=True)
class Compared:
    """All seeds of one variant.

    Attributes:
        name: of the variant.
        title: what a table calls it.
        outcomes: of the complete runs, by seed.
        missing: seeds of the runs that are not complete, each with how far it is.
    """

    name: str
    title: str
    outcomes: list[Outcome]
    missing: dict[int, int] = field(default_factory=dict)

    @property
    def unfinished(self) -> str:
        """The missing runs in words."""
        seeds = [
            f"{seed} (at step {step:,})" if step else f"{seed}"
            for seed, step in self.missing.items()
        ]
        return f"{self.title}: seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"

    def values(self, metric: str, typeface: str = "") -> list[float]:
        """A held-out metric of each seed, of all probes or of a typeface."""
        key = f"{typeface}/{metric}" if typeface else metric
        return [outcome.heldout[key] for outcome in self.outcomes]

    def spread(self, metric: str, typeface: str = "") -> Spread:
        """The same over the seeds."""
        return Spread.of(self.values(metric, typeface))

    def mean(self, attribute: str) -> float:
        """Mean of an attribute of the outcomes."""
        return statistics.fmean(getattr(outcome, attribute) for outcome in self.outcomes)


class Claim(NamedTuple):
    """That one variant does as well as another.

    Attributes:
        variant, reference: names of the two.
        easy: typeface on which rank-1 may be `points` of a percent lower at most.
        points: see `easy`.
        hard: typeface on which the mean may not be below the lowest seed of the reference.
        alike: name of a third variant, whose samples meet about as many classes as those of
            `variant` but other ones; it tells whether a difference comes with their number.
    """

    variant: str
    reference: str
    easy: str
    points: float
    hard: str
    alike: str = ""

    def judge(self, compared: Sequence[Compared]) -> list[str]:
        """What the figures say of it: a sentence for each typeface."""
        found = {each.name: each for each in compared}
        mine, theirs = found[self.variant], found[self.reference]
        for each in (mine, theirs):
            if not each.outcomes:
                return [f"Not decided yet: no run of {each.title} is complete."]
        sentences = [self._easy(mine, theirs), self._hard(mine, theirs)]
        third = found.get(self.alike)
        if third and third.outcomes and self._below(mine, theirs) > self.points:
            sentences.append(self._why(third, mine, theirs))
        return sentences

    def _easy(self, mine: Compared, theirs: Compared) -> str:
        ours, full = (each.spread(RANK1, self.easy).mean for each in (mine, theirs))
        below = self._below(mine, theirs)
        holds = "holds" if below <= self.points else "does **not** hold"
        return (
            f"Rank-1, {self.easy}: {mine.title} {_points(ours)}, {theirs.title} {_points(full)}, a "
            f"difference of {0 - below:+.2f} points. At most {self.points:g} below: {holds}."
        )

    def _why(self, third: Compared, mine: Compared, theirs: Compared) -> str:
        """Whether who meets as few classes in another way loses as much."""
        lost, ours = self._below(third, theirs), self._below(mine, theirs)
        met = ", ".join(
            f"{each.mean('classes_seen'):,.0f} with {each.title}" for each in (third, mine, theirs)
        )
        text = (
            f"Classes that a sample meets: {met}. {third.title} is {lost:.2f} points below "
            f"{theirs.title} on {self.easy}: "
        )
        if lost >= 0.5 * ours:
            return text + (
                "most of the difference comes with meeting fewer classes in as many steps, "
                "not with how they are chosen."
            )
        return text + "meeting fewer classes is not what most of the difference comes with."

    def _below(self, mine: Compared, theirs: Compared) -> float:
        """By how many points a variant is below another on the easy typeface."""
        ours, full = (each.spread(RANK1, self.easy).mean for each in (mine, theirs))
        return round(100 * (full - ours), 6)  # 0.3 is 0.3, whatever a difference of floats is

    def _hard(self, mine: Compared, theirs: Compared) -> str:
        ours, full = (each.spread(RANK1, self.hard) for each in (mine, theirs))
        seeds = f"from {_points(full.low)} to {_points(full.high)}"
        text = (
            f"Rank-1, {self.hard}: {mine.title} {_points(ours.mean)}, {theirs.title} "
            f"{_points(full.mean)}, whose seeds lie {seeds}."
        )
        if len(theirs.outcomes) < 2:
            return f"{text} Within the spread of the seeds: not decided, it takes two seeds."
        holds = "holds" if ours.mean >= full.low else "does **not** hold"
        above = ", above it" if ours.mean > full.high else ""
        return f"{text} Within the spread of the seeds, or above: {holds}{above}."


def _points(share: float) -> str:
    return f"{100 * share:.2f}"
