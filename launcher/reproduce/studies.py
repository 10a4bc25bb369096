"""What `mhe reproduce` trains: runs that share a config and differ in the head and the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from mhe_dist.errors import UserError
from pipelines.report.comparison import Claim

CONFIGS = Path(__file__).parents[2] / "configs"


class Variant(NamedTuple):
    """One thing to compare: its name, what a table calls it, and what it changes in the config."""

    name: str
    title: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: of the study.
        title: heading of its part of the page.
        text: what is compared on what, for the page.
        config: file in `configs/` that the runs share.
        variants: what they differ in.
        seeds: how many seeds by default, counted from 0.
        typefaces: names in `evaluate.typefaces` of the config, each with what the page calls it;
            none: the figures of all probes.
        minutes: of training that a run may take; 0: as the config says.
        claim: what the page has to judge.
    """

    name: str
    title: str
    text: str
    config: str
    variants: tuple[Variant, ...]
    seeds: int = 1
    typefaces: tuple[tuple[str, str], ...] = ()
    minutes: float = 0.0
    claim: Claim | None = None

    @property
    def file(self) -> str:
        """Path of the config."""
        return str(CONFIGS / self.config)

    def chosen(self, only: Sequence[str]) -> list[Variant]:
        """The variants of these names, all if none is named.

        Raises:
            UserError: there is no such variant.
        """
        known = {variant.name: variant for variant in self.variants}
        for name in only:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}? There are" if near else "there are"
                raise UserError(f"--only {name}: {hint} {', '.join(known)}")
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
        """What it changes in the study's config."""
        return [*self.variant.overrides, f"run.seed={self.seed}", f"run.name={self.name}"]


def plan_runs(study: Study, variants: Sequence[Variant], seeds: int) -> Iterator[PlannedRun]:
    """Every run, seed by seed, so that all heads can be compared after the first one."""
    for seed in range(seeds):
        for variant in variants:
            yield PlannedRun(study, variant, seed)


def _head(name: str, title: str, *settings: str) -> Variant:
    return Variant(name, title, tuple(f"head.{setting}" for setting in settings))


SMALL = Study(
    name="small",
    title="6,000 classes",
    text=(
        "CJK characters as identities, about 16 typefaces each. Probes are 2,000 characters that "
        "no run saw, in typefaces that no run saw; each is enrolled by one image in a typeface "
        "of the training."
    ),
    config="glyphs_cjk_small.yaml",
    variants=(
        _head("full", "full softmax", "kind=full"),
        _head("partial_fc", "PartialFC 0.1", "kind=partial_fc", "partial_fc.rate=0.1"),
        _head("mhs_own", "MHS {60;100} own", "kind=mhs", "mhs.length=100", "mhs.negatives=own"),
        _head(
            *("mhs_own_plus", "MHS {60;100} own + 5", "kind=mhs", "mhs.length=100"),
            *("mhs.negatives=own_plus", "mhs.extra_heads=5"),
        ),
        _head(
            *("mhs_batch", "MHS {600;10} batch", "kind=mhs", "mhs.length=10"),
            *("mhs.exchange=gather", "mhs.negatives=batch", "mhs.extra_heads=0"),
        ),
        _head("mhp", "MHP {78;77}", "kind=mhp"),
        _head("mhc", "MHC {78;77}", "kind=mhc"),
    ),
    seeds=3,
    typefaces=(("wenkai", "LXGW WenKai, easy"), ("brush", "Kouzan brush, hard")),
    claim=Claim(
        *("mhs_own_plus", "full"), easy="wenkai", points=0.3, hard="brush", alike="partial_fc"
    ),
)

FULL = Study(
    name="full",
    title="More than 80,000 classes",
    text=(
        "The same typefaces and the same held-out characters, with every other character that "
        "three font files have. A run gets as many steps as half an hour allows, as a short trial "
        "predicts them; its learning rate falls over these."
    ),
    config="glyphs_cjk_full.yaml",
    variants=(
        _head("mhs", "MHS {735;128} own + 72", "kind=mhs"),
        _head("partial_fc", "PartialFC 0.1", "kind=partial_fc", "partial_fc.rate=0.1"),
    ),
    typefaces=SMALL.typefaces,
    minutes=30.0,
)

_CODES = {"10_10": "[10,10]", "4_5_5": "[4,5,5]"}

PAPER = Study(
    name="paper100",
    title="100 classes, as the paper compares on CIFAR-100",
    text=(
        "Plain softmax without margin, heads of {10;10} and {4;5;5}. The classes are characters "
        "in matplotlib's typefaces, the probes 500 characters that no run saw, in typefaces that "
        "no run saw. MHS {4;5;5} has 20 heads of 5 classes; both MHS see their own head and three "
        "others."
    ),
    config="glyphs_100.yaml",
    variants=(
        _head("one_hot", "one-hot", "kind=full"),
        *(
            _head(
                *(f"{kind}_{code}", f"{kind.upper()} {{{code.replace('_', ';')}}}"),
                *(f"kind={kind}", f"{kind}.lengths={lengths}"),
            )
            for kind in ("mhp", "mhc")
            for code, lengths in _CODES.items()
        ),
        _head("mhs_10_10", "MHS {10;10} own + 3", "kind=mhs", "mhs.length=10"),
        _head("mhs_4_5_5", "MHS {4;5;5} own + 3", "kind=mhs", "mhs.length=5"),
    ),
    seeds=3,
)

STUDIES = {study.name: study for study in (SMALL, FULL, PAPER)}
