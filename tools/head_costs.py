"""What the heads of a study cost beside what they find: a table and a picture of both.

    python tools/head_costs.py results docs/head-costs.png

For docs/choosing.md: the runs of `mhe reproduce heads` and `heads_once`. Costs are of a step of one
of the two workers, counted with the settings of the run on a device that computes nothing (`mhe
bench launches`), so they are the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from pipelines.bench.counted.launches import count_step
from pipelines.bench.counted.run_costs import case_of_run
from pipelines.report.figures import save_figure
from pipelines.report.plots import BLUE, ORANGE, STYLE
from tools.head_ranking import ScoredHead, kept_runs, mean_by_head, scored_runs

WORKERS: Final = 2
PANELS: Final = (("easy typeface", BLUE), ("hard typeface", ORANGE))  # by number in the figures
NAMES: Final = {
    "full": "full",
    "partial_fc": "PartialFC 0.1",
    "mhs_own_plus": "MHS own 100 + 5",
    "mhs_one_head": "MHS own 600",
    "mhs_groups10": "MHS group of 10 x 100",
    "mhs_groups16": "MHS group of 16 x 25",
    "mhs_batch": "MHS batch",
    "mhs_own": "MHS own 100",
    "mhs_own_new": "MHS own 100, new heads",
    "mhp": "MHP",
    "mhc": "MHC",
}
LEFT: Final = {"mhs_groups16", "mhs_own"}  # names that are written left of their points
BELOW: Final = {"mhs_own", "mhs_own_new"}


class HeadCost(NamedTuple):
    """A head, what it found and what it costs.

    Attributes:
        found: means over the seeds.
        runs: the seeds.
        moved: MB of device memory that a step of a worker's head reads and writes.
        gflop: of its products, 10^9.
        launches: kernels and copies.
    """

    found: ScoredHead
    runs: list[ScoredHead]
    moved: float
    gflop: float
    launches: int


def costs_of_heads(folder: Path) -> list[HeadCost]:
    """Every head of the two studies in a folder of results, the cheapest first."""
    runs, costs = scored_runs(folder), []
    kept = {run.head: run for run in kept_runs(folder)}  # seeds cost the same
    for head in mean_by_head(runs):
        _, config, summary = kept[head.name]
        scale = config.scale.model_copy(update={"workers": WORKERS})
        config = config.model_copy(update={"scale": scale})
        step = count_step(case_of_run(config, summary["classes"], config.train.precision))
        seeds = [run for run in runs if run.name == head.name]
        costs.append(HeadCost(head, seeds, step.moved / 1e6, step.flops / 1e9, step.launches))
    return sorted(costs, key=lambda cost: cost.moved)


def is_best(cost: HeadCost, others: Sequence[HeadCost], panel: int) -> bool:
    """Whether no head that costs as little or less found more, in the typeface of a panel."""
    return all(
        other.found.figures[panel] <= cost.found.figures[panel]
        for other in others
        if other.moved <= cost.moved
    )


def table(costs: Sequence[HeadCost]) -> str:
    """The table of docs/choosing.md; heads that nothing cheaper exceeds are in bold type."""
    lines = [
        "| head | MB moved | GFLOP | kernels | easy: rank-1 | hard: rank-1 |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        figures = [
            f"**{value:.1f}**" if is_best(cost, costs, panel) else f"{value:.1f}"
            for panel, value in enumerate(cost.found.figures[:2])
        ]
        cells = (f"{cost.moved:.0f}", f"{cost.gflop:.2f}", str(cost.launches), *figures)
        lines.append(f"| {NAMES[cost.found.name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(costs: Sequence[HeadCost]) -> Figure:
    """A panel for each typeface: rank-1 over the memory that a step moves."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        for number, (axes, (title, colour)) in enumerate(zip(panels, PANELS, strict=True)):
            _draw_panel(axes, costs, number, colour)
            axes.set_title(title, fontsize=9.5)
        panels[0].set_ylabel("rank-1 of unseen classes, percent")
        figure.supxlabel("MB of memory that a worker's head reads and writes in a step", fontsize=9)
    return figure


def _draw_panel(axes: Axes, costs: Sequence[HeadCost], panel: int, colour: str) -> None:
    shown = [cost for cost in costs if cost.found.name not in ("mhp", "mhc")]
    best = [cost for cost in shown if is_best(cost, costs, panel)]
    steps = [(cost.moved, cost.found.figures[panel]) for cost in best]
    steps.append((max(cost.moved for cost in shown) * 1.3, steps[-1][1]))
    axes.step(*zip(*steps, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
    for cost in shown:
        mean = cost.found.figures[panel]
        seeds = [run.figures[panel] for run in cost.runs]
        axes.plot([cost.moved] * len(seeds), seeds, "o", color=colour, alpha=0.3, markersize=4)
        axes.plot([cost.moved], [mean], "o", color=colour, markersize=7)
        is_left = cost.found.name in LEFT
        axes.annotate(
            NAMES[cost.found.name],
            (cost.moved, mean),
            xytext=(-6 if is_left else 6, -10 if cost.found.name in BELOW else 5),
            ha="right" if is_left else "left",
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.3, y=0.1)


if __name__ == "__main__":
    found = costs_of_heads(Path(sys.argv[1]))
    save_figure(draw(found), sys.argv[2])
    print(table(found))
