"""Figures of pages are those of the kept runs: means over the seeds, rounded once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launcher.reproduce.studies import FULL, GROUPS, HEADS, HEADS_ONCE, MARGINS, Study

ROOT = Path(__file__).parents[2]
FIGURES = ("wenkai/rank1", "wenkai/tar@far=1e-4", "brush/rank1", "brush/tar@far=1e-4")
ROW = re.compile(r"\| (\d\d\.\d), (\d\d\.\d) \| (\d\d\.\d), (\d+\.\d) \|")


def kept(study: Study) -> dict[str, tuple[str, ...]]:
    """Rank-1 and TAR in the easy typeface and in the hard one of each variant, in percent."""
    found = {}
    for variant in study.variants:
        runs = sorted((ROOT / "results").glob(f"{study.name}-{variant.name}-seed*/summary.json"))
        heldout = [json.loads(run.read_text())["heldout"] for run in runs]
        if heldout:
            means = [100 * np.mean([each[name] for each in heldout]) for name in FIGURES]
            found[variant.name] = tuple(f"{mean:.1f}" for mean in means)
    return found


def test_the_guide_to_heads_has_the_figures_of_the_kept_runs_and_no_others() -> None:
    studies = [kept(study) for study in (HEADS, HEADS_ONCE, GROUPS, MARGINS, FULL)]
    runs = {figures for study in studies for figures in study.values()}
    shown = ROW.findall((ROOT / "docs" / "choosing.md").read_text())
    assert len(shown) > 40
    assert set(shown) == runs


@pytest.mark.parametrize("page", ["README.md", "configs/glyphs_cjk_full.yaml"])
def test_who_names_figures_of_94_000_classes_has_those_of_the_kept_runs(page: str) -> None:
    text = (ROOT / page).read_text()
    for variant, (easy, _, hard, _) in kept(FULL).items():
        assert re.search(rf"{easy} % (?:\||and) {hard} %", text), variant


@pytest.mark.parametrize(
    ("config", "head", "variant"),
    [
        ("glyphs_heads", "mhs as here", "mhs_own_plus"),
        ("glyphs_heads", "full", "full"),
        ("glyphs_heads", "partial_fc 0.1", "partial_fc"),
    ],
)
def test_a_header_has_the_figures_of_the_kept_runs(config: str, head: str, variant: str) -> None:
    text = re.sub(r"\n#\s+", " ", (ROOT / "configs" / f"{config}.yaml").read_text())
    assert f"{kept(HEADS)[variant][0]} % with {head}" in text
