"""What a study of `mhe reproduce` is: variants of a run, over seeds, and the runs that make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mhe_dist.errors import UserError, list_choices
from pipelines.report.comparison import RECOGNITION, Claim, Measure
from pipelines.sources.planted.faults import FaultRates

UNTRAINED = "untrained"  # the backbone that the study's config begins with


class Variant(NamedTuple):
    """A variant of a study.

    Attributes:
        name: of the variant.
        title: in tables.
        overrides: of the config.
        clustered_by: the variant whose backbone embeds the images to make this one's labels, or
            `UNTRAINED`; empty: the labels are those of the data.
        is_dirty: whether it trains on data that faults were planted into.
        audited_by: of a dirty one: the variant whose backbone finds the faults that this one trains
            without; empty: it trains with all of them.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    clustered_by: str = ""
    is_dirty: bool = False
    audited_by: str = ""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: of the study.
        title: heading of its section on the page.
        text: for the page: what is compared, and on which data.
        config: that the runs share: the name of one that comes with mhe.
        variants: what is compared.
        seeds: default number of seeds, counted from 0.
        typefaces: names in `evaluate.typefaces` of the config, or `labels` for `evaluate.labels`,
            each with its title on the page; none: the figures of all probes.
        measures: what is compared on each of them.
        claims: claims that the page checks.
        classes: how many are made for variants whose labels are clustered.
        labels_per_image: of these classes, at most.
        faults: what is planted for dirty variants; None: nothing.
        false_rate: of the audits.
    """

    name: str
    title: str
    text: str
    config: str
    variants: tuple[Variant, ...]
    seeds: int = 1
    typefaces: tuple[tuple[str, str], ...] = ()
    measures: tuple[Measure, ...] = RECOGNITION
    claims: tuple[Claim, ...] = ()
    classes: int = 0
    labels_per_image: int = 1
    faults: FaultRates | None = None
    false_rate: float = 0.01

    def select_variants(self, only: Sequence[str]) -> list[Variant]:
        """The variants of these names, or all if `only` is empty.

        Raises:
            UserError: there is no such variant.
        """
        known = {variant.name: variant for variant in self.variants}
        for name in only:
            if name not in known:
                raise UserError(f"--only {name}: {list_choices(name, known)}")
        return [known[name] for name in dict.fromkeys(only)] if only else list(self.variants)


class PlannedRun(NamedTuple):
    """A run of a study: an ordinary run of that name."""

    study: Study
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.study.name}-{self.variant.name}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Its overrides of the study's config."""
        return [*self.variant.overrides, f"run.seed={self.seed}", f"run.name={self.name}"]

    @property
    def embedded_by(self) -> str:
        """Name of the run whose backbone makes its labels; empty: they are made without one."""
        by = self.variant.clustered_by or self.variant.audited_by
        return f"{self.study.name}-{by}-seed{self.seed}" if by else ""

    @property
    def planted(self) -> str:
        """Name of the folder of its dirty data; empty: it trains on clean data."""
        return f"{self.study.name}-planted-seed{self.seed}" if self.variant.is_dirty else ""

    @property
    def audit(self) -> str:
        """Name of the folder of the audit that its labels are from, or that it is the judge of.

        Empty: there is none.
        """
        is_judge = self.study.faults is not None and not self.variant.is_dirty
        return f"{self.name}-audit" if self.variant.audited_by or is_judge else ""

    @property
    def labels(self) -> str:
        """Name of its label set; empty: the labels are those of the data."""
        if self.variant.clustered_by:
            return f"{self.name}-labels"
        if self.variant.audited_by:
            return f"{self.audit}/labels"
        return f"{self.planted}/labels" if self.planted else ""


def plan_runs(study: Study, variants: Sequence[Variant], seeds: int) -> Iterator[PlannedRun]:
    """Yield every run, seed by seed, so that all variants can be compared after the first seed."""
    for seed in range(seeds):
        for variant in variants:
            yield PlannedRun(study, variant, seed)
