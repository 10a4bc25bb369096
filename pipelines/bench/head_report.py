"""Table, ratios, plot and JSON of `mhe bench head`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from mhe_dist.sizes import GIB
from pipelines.bench.head import PHASES, HeadCase
from pipelines.report.plots import BLUE, GREEN, GREY, ORANGE, STYLE

COLOURS = {"full": GREY, "partial_fc": ORANGE, "mhs_gather": GREEN, "mhs": BLUE}
NAMES = {
    "full": "full",
    "partial_fc": "PartialFC 0.1",
    "mhs_gather": "mhs gather",
    "mhs": "mhs route",
}
_CAPTION = (
    "ms of a step, and of its planning, forward, backward and update; first: additional ms of a "
    "step that uses its rows for the first time. GiB that the head took at its peak, of the GiB of "
    "all rows and their momentum; MB that a rank sent per step; classes seen by a sample. With "
    "fewer heads than samples, samples share heads and fewer rows are touched."
)


@dataclass(frozen=True)
class HeadMeasurement:
    """A case, and the figures of `pipelines.bench.head.measure_case`."""

    case: HeadCase
    figures: dict[str, float]


@dataclass(frozen=True)
class TimesInTurn:
    """Times that were measured in turn, so that their ratios are reliable.

    Attributes:
        mhs: number of classes -> seconds of a routed step.
        bare: seconds of a routed `step` on one rank, and of its `bare` products.
        one_label: as `mhs`, with one label per sample where that has several.
        labels: how many a sample has.
        heads: number of classes -> heads that a step touches, over those with one label.
    """

    mhs: dict[int, float]
    bare: dict[str, float] | None
    one_label: dict[int, float] = field(default_factory=dict)
    labels: int = 1
    heads: dict[int, float] = field(default_factory=dict)


def measurements_table(results: Sequence[HeadMeasurement]) -> Table:
    """A row for each case."""
    # No box: with lines between them, twelve columns do not fit into 80 characters.
    out = Table(title="One step of the head", title_justify="left", box=None)
    out.padding, out.pad_edge = (0, 1, 0, 0), False
    out.caption_justify = "left"
    out.caption = _CAPTION
    for name in (
        "head",
        "C",
        "ms",
        "plan",
        "fwd",
        "bwd",
        "upd",
        "first",
        "GiB",
        "of",
        "MB",
        "seen",
    ):
        out.add_column(name, justify="left" if name == "head" else "right", no_wrap=True)
    for result in results:
        figures = result.figures
        out.add_row(
            NAMES[result.case.kind],
            short_count(result.case.classes),
            *(f"{1e3 * figures[name]:,.0f}" for name in ("step", *PHASES, "first_touch")),
            f"{figures['peak'] / GIB:.1f}",
            f"{figures['bank'] / GIB:.1f}",
            f"{figures['sent'] / 1e6:.1f}",
            short_count(round(figures["classes_seen"])),
        )
    return out


def short_count(number: int) -> str:
    """A number in about three digits: 125k, 1M, 9.6k."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def time_ratios(results: Sequence[HeadMeasurement], in_turn: TimesInTurn) -> list[tuple[str, str]]:
    """The ratios that matter, as `(what, figure)`."""
    figures = {(r.case.kind, r.case.classes): r.figures for r in results}
    found: list[tuple[str, str]] = []
    *others, most_classes = sorted(in_turn.mhs) or [0]
    for fewer_classes in others:
        over = f"mhs route, {short_count(most_classes)} over {short_count(fewer_classes)} classes"
        found.append(
            (over, f"{in_turn.mhs[most_classes] / in_turn.mhs[fewer_classes]:.2f} x the time")
        )
    for classes, seconds in sorted(in_turn.one_label.items()):
        over = f"mhs route, {in_turn.labels} labels over one, {short_count(classes)} classes"
        found.append((over, f"{in_turn.mhs[classes] / seconds:.2f} x the time"))
    for classes, ratio in sorted(in_turn.heads.items()):
        over = f"mhs route, {in_turn.labels} labels over one, {short_count(classes)} classes, rows"
        found.append((over, f"{ratio:.2f} x those a step touches"))
    sizes = sorted(classes for kind, classes in figures if kind == "mhs")
    if sizes:
        largest = figures["mhs", sizes[-1]]
        for kind in ("partial_fc", "full", "mhs_gather"):
            common = [classes for classes in sizes if (kind, classes) in figures]
            for classes in common[-1:]:
                times = figures[kind, classes]["step"] / figures["mhs", classes]["step"]
                over = f"{NAMES[kind]} over mhs route, {short_count(classes)} classes"
                found.append((over, f"{times:.1f} x the time"))
        if results[0].case.memory != "file":
            size = f"{short_count(sizes[-1])} classes"
            over = f"mhs route, {size}, all that it takes over rows and state"
            found.append((over, f"{largest['peak'] / largest['bank']:.2f} x the memory"))
    if in_turn.bare:
        times = in_turn.bare["step"] / in_turn.bare["bare"]
        found.append(("mhs route on one rank over its bare products", f"{times:.2f} x the time"))
    return found


def plot_measurements(results: Sequence[HeadMeasurement], file: Path) -> None:
    """Plot time and peak memory over the number of classes to a PNG; both axes are logarithmic."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8))
        left, right = figure.subplots(1, 2)
        _plot_curves(left, results, "step", "Time per step of the head", "seconds", 1.0)
        _plot_curves(right, results, "peak", "Peak memory, all ranks", "GiB", GIB)
        left.legend(loc="best")
        FigureCanvasAgg(figure).print_figure(file, metadata={"Software": None})


def _plot_curves(
    axes: Axes, results: Sequence[HeadMeasurement], key: str, title: str, unit: str, divisor: float
) -> None:
    for kind in dict.fromkeys(result.case.kind for result in results):
        mine = sorted(
            (r.case.classes, r.figures[key] / divisor) for r in results if r.case.kind == kind
        )
        axes.plot(*zip(*mine, strict=True), marker="o", label=NAMES[kind], color=COLOURS[kind])
    axes.set(title=title, xlabel="classes", ylabel=unit, xscale="log", yscale="log")
    sizes = sorted({result.case.classes for result in results})
    axes.set_xticks(sizes, [short_count(size) for size in sizes])
    axes.minorticks_off()


def save_measurements(results: Sequence[HeadMeasurement], in_turn: TimesInTurn, file: Path) -> None:
    """Write everything as JSON."""
    cases = [{"case": asdict(r.case), "figures": r.figures} for r in results]
    found = {
        "cases": cases,
        "in_turn": asdict(in_turn),
        "ratios": dict(time_ratios(results, in_turn)),
    }
    file.write_text(json.dumps(found, indent=2) + "\n")
