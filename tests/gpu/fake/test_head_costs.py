"""The page's table of costs is that of the runs that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.head_costs import costs_of_heads, is_best, table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_the_page_shows_what_is_counted() -> None:
    costs = costs_of_heads(ROOT / "results")
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert table(costs) in page, "run: python tools/head_costs.py results docs/head-costs.png"
    by_name = {cost.found.name: cost for cost in costs}
    for panel in (0, 1):
        figures = [cost.found.figures[panel] for cost in costs]
        best = [cost.found.figures[panel] for cost in costs if is_best(cost, costs, panel)]
        assert best == sorted(best) and best[-1] == max(figures)
    assert by_name["full"].gflop > 9 * by_name["mhs_own_plus"].gflop
    assert by_name["mhs_own_plus"].moved < by_name["full"].moved / 3
