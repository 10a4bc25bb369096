"""Compares variants of a run over several seeds: their results, and whether a claim holds. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics.roc import tar_name

RANK1, TAR = "rank1", tar_name(1e-4)


class Measure(NamedTuple):
    """A held-out metric that a study compares.

    Attributes:
        metric: its name in the metrics, behind that of the group of probes.
        title: in tables and pictures.
        guess: the metric of a guess that looks at no image; empty: there is none.
    """

    metric: str
    title: str
    guess: str = ""


RECOGNITION = (Measure(RANK1, "rank-1"), Measure(TAR, "TAR"))
CLOSED_SET = Measure("classification/top1", "top-1 of the training's classes")
LABEL_RANKING = tuple(
    Measure(name, name.upper(), f"frequent/{name}") for name in ("p@1", "p@5", "psp@5")
)


class Outcome(NamedTuple):
    """The results of a complete run.

    Attributes:
        seed: of the run.
        heldout: metrics of its last evaluation, by name.
        classes_seen: number of classes in the softmax of a sample, mean over the run.
        head_s: seconds that a step spends in the head, median over the run.
        memory_gib: largest resident memory of a worker.
        images_per_s: over all workers, while training.
        train_s: seconds of training, see `training_seconds`.
        steps, epochs: length of the run.
        device: what computed; empty: the run recorded none.
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
    device: str = ""

    @classmethod
    def of(
        cls, seed: int, batch: int, summary: dict[str, Any], records: Sequence[dict[str, Any]]
    ) -> Outcome:
        """Read the results from the files of a run.

        Args:
            seed: of the run.
            batch: images per step.
            summary: its `summary.json`.
            records: the lines of its `metrics.jsonl`.
        """

        def series(name: str) -> list[float]:
            return [record[name] for record in records if name in record] or [float("nan")]

        seconds = training_seconds(records, batch) or float("nan")
        return cls(
            seed,
            summary["heldout"],
            statistics.fmean(series("classes_seen")),
            statistics.median(series("head_time")),
            max(series("peak_rss_gib")),
            summary["steps"] * batch / seconds,
            seconds,
            summary["steps"],
            summary["steps"] * batch / summary["samples"],
            summary.get("device") or "",
        )


def training_seconds(records: Sequence[dict[str, Any]], batch: int) -> float:
    """Seconds that the steps of a run took, before a resume too; a repeated step counts once.

    Args:
        records: the lines of its `metrics.jsonl`.
        batch: images per step.
    """
    seconds, done = 0.0, 0
    for record in records:
        if "images_per_s" in record:  # the mean since the last record that has one
            seconds += (record["step"] + 1 - done) * batch / record["images_per_s"]
            done = record["step"] + 1
    return seconds


class Spread(NamedTuple):
    """A figure over seeds: its mean, lowest and highest value."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), min(values), max(values))


@dataclass(frozen=True)
class VariantResult:
    """The runs of one variant.

    Attributes:
        name: of the variant.
        title: its name in tables.
        outcomes: of the complete runs, by seed.
        missing: seed -> step that an incomplete run has reached.
    """

    name: str
    title: str
    outcomes: list[Outcome]
    missing: dict[int, int] = field(default_factory=dict)

    @property
    def unfinished(self) -> str:
        """A description of the missing runs."""
        seeds = [
            f"{seed} (at step {step:,})" if step else f"{seed}"
            for seed, step in self.missing.items()
        ]
        return f"{self.title}: seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"

    def values(self, metric: str, typeface: str = "") -> list[float]:
        """A held-out metric of each seed, over all probes or those in a typeface.

        Raises:
            UserError: a run has no such figure.
        """
        key = f"{typeface}/{metric}" if typeface else metric
        for outcome in self.outcomes:
            if key not in outcome.heldout:
                raise UserError(
                    f"{self.title}: the run of seed {outcome.seed} has no figure {key}, which its "
                    "study compares; train it anew in another --out, with the evaluations of the "
                    "study's config"
                )
        return [outcome.heldout[key] for outcome in self.outcomes]

    def spread(self, metric: str, typeface: str = "") -> Spread:
        """`values` as a spread over the seeds."""
        return Spread.of(self.values(metric, typeface))

    def gains(self, measure: Measure, typeface: str) -> list[float]:
        """What each seed is above the guess of a measure."""
        reached = self.values(measure.metric, typeface)
        guessed = self.values(measure.guess, typeface)
        return [ours - guess for ours, guess in zip(reached, guessed, strict=True)]

    def mean(self, attribute: str) -> float:
        """Mean of an attribute of the outcomes."""
        return statistics.fmean(getattr(outcome, attribute) for outcome in self.outcomes)

    def by_device(self) -> dict[str, VariantResult]:
        """The complete runs of each device: only among these can speeds be averaged."""
        devices = dict.fromkeys(outcome.device for outcome in self.outcomes)
        return {
            device: VariantResult(
                self.name, self.title, [each for each in self.outcomes if each.device == device]
            )
            for device in devices
        }


class Claim(NamedTuple):
    """The claim that one variant does as well as another.

    Attributes:
        variant, reference: names of the two variants.
        easy: typeface on which rank-1 may be at most `points` percentage points lower.
        points: see `easy`.
        hard: typeface on which the mean may not be below the lowest seed of the reference.
        tar_points: percentage points by which TAR may be lower, on each of the two.
        control: name of a third variant, whose samples see about as many classes as those of
            `variant`, chosen in another way. It shows whether their number explains a difference.
    """

    variant: str
    reference: str
    easy: str
    points: float
    hard: str
    tar_points: float = 1.0
    control: str = ""

    def verdict(self, results: Sequence[VariantResult]) -> list[str]:
        """Whether the figures support the claim: sentences for rank-1 and TAR on each typeface."""
        by_name = {each.name: each for each in results}
        variant, reference = by_name[self.variant], by_name[self.reference]
        for each in (variant, reference):
            if not each.outcomes:
                return [f"Not decided yet: no run of {each.title} is complete."]
        sentences = [
            _bound_sentence("Rank-1", RANK1, self.easy, self.points, variant, reference),
            self._hard_sentence(variant, reference),
            *(
                _bound_sentence("TAR", TAR, typeface, self.tar_points, variant, reference)
                for typeface in (self.easy, self.hard)
            ),
        ]
        control = by_name.get(self.control)
        if (
            control
            and control.outcomes
            and _gap(RANK1, self.easy, variant, reference) > self.points
        ):
            sentences.append(self._control_sentence(control, variant, reference))
        return sentences

    def _control_sentence(
        self, control: VariantResult, variant: VariantResult, reference: VariantResult
    ) -> str:
        """Whether the control, which sees as few classes, is as far below the reference."""
        control_gap, gap = (_gap(RANK1, self.easy, each, reference) for each in (control, variant))
        seen = ", ".join(
            f"{each.mean('classes_seen'):,.0f} with {each.title}"
            for each in (control, variant, reference)
        )
        text = (
            f"Classes that a sample sees: {seen}. "
            f"{control.title} is {control_gap:.2f} points below {reference.title} on {self.easy}: "
        )
        if control_gap >= 0.5 * gap:
            return text + (
                "most of the difference comes from seeing fewer classes in as many steps, "
                "not from how they are chosen."
            )
        return text + "seeing fewer classes does not explain most of the difference."

    def _hard_sentence(self, variant: VariantResult, reference: VariantResult) -> str:
        ours, full = (each.spread(RANK1, self.hard) for each in (variant, reference))
        seeds = f"from {_percent(full.low)} to {_percent(full.high)}"
        text = (
            f"Rank-1, {self.hard}: {variant.title} {_percent(ours.mean)}, {reference.title} "
            f"{_percent(full.mean)}, whose seeds lie {seeds}."
        )
        if len(reference.outcomes) < 2:
            return f"{text} Within the spread of the seeds: not decided, it takes two seeds."
        holds = "holds" if ours.mean >= full.low else "does **not** hold"
        above = ", above it" if ours.mean > full.high else ""
        return f"{text} Within the spread of the seeds, or above: {holds}{above}."


def _bound_sentence(
    title: str,
    metric: str,
    typeface: str,
    points: float,
    variant: VariantResult,
    reference: VariantResult,
) -> str:
    """Whether a metric is at most so many percentage points lower than the reference's."""
    ours, theirs = (each.spread(metric, typeface).mean for each in (variant, reference))
    gap = _gap(metric, typeface, variant, reference)
    holds = "holds" if gap <= points else "does **not** hold"
    return (
        f"{title}, {typeface}: {variant.title} {_percent(ours)}, {reference.title} "
        f"{_percent(theirs)}, a difference of {0 - gap:+.2f} points. At most {points:g} below: "
        f"{holds}."
    )


def _gap(metric: str, typeface: str, variant: VariantResult, reference: VariantResult) -> float:
    """Percentage points by which a variant's mean is below the reference's."""
    ours, theirs = (each.spread(metric, typeface).mean for each in (variant, reference))
    return round(100 * (theirs - ours), 6)  # so that 0.3 is 0.3 after the subtraction


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
