"""Table, ratios, plot and JSON of `mhe bench head`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from pipelines.bench.head import PHASES, Case
from pipelines.report.plots import BLUE, GREEN, GREY, ORANGE, STYLE

COLOURS = {"full": GREY, "partial_fc": ORANGE, "mhs_gather": GREEN, "mhs": BLUE}
NAMES = {
    "full": "full",
    "partial_fc": "PartialFC 0.1",
    "mhs_gather": "mhs gather",
    "mhs": "mhs route",
}
GIB = 2**30
_CAPTION = (
    "ms of a step, and its planning, forward, backward and update; first: what more a step took "
    "when it met its rows for the first time. GiB that the head took at its peak, of what all rows "
    "and their momentum are; MB that a rank sent per step; classes seen by a sample. With fewer "
    "heads than samples, samples share heads and fewer rows are touched."
)


@dataclass(frozen=True)
class Result:
    """A case, and what `pipelines.bench.head.run` measured."""

    case: Case
    figures: dict[str, float]


@dataclass(frozen=True)
class Turns:
    """Times that were taken in turn, whose ratios count.

    Attributes:
        mhs: seconds of a routed step by number of classes.
        bare: of a routed `step` on one rank and of its `bare` products.
    """

    mhs: dict[int, float]
    bare: dict[str, float] | None


def table(results: Sequence[Result]) -> Table:
    """One line per case."""
    # No box: its rules between twelve columns would not leave room for them on 80 characters.
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
            count(result.case.classes),
            *(f"{1e3 * figures[name]:,.0f}" for name in ("step", *PHASES, "first_touch")),
            f"{figures['peak'] / GIB:.1f}",
            f"{figures['bank'] / GIB:.1f}",
            f"{figures['sent'] / 1e6:.1f}",
            count(round(figures["classes_seen"])),
        )
    return out


def count(number: int) -> str:
    """A number in three digits or so: 125k, 1M, 9.6k."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def ratios(results: Sequence[Result], turns: Turns) -> list[tuple[str, str]]:
    """What the table is about, as `(what, figure)`."""
    figures = {(r.case.kind, r.case.classes): r.figures for r in results}
    found: list[tuple[str, str]] = []
    *smaller, most = sorted(turns.mhs) or [0]
    for few in smaller:
        over = f"mhs route, {count(most)} over {count(few)} classes"
        found.append((over, f"{turns.mhs[most] / turns.mhs[few]:.2f} x the time"))
    sizes = sorted(classes for kind, classes in figures if kind == "mhs")
    if sizes:
        largest = figures["mhs", sizes[-1]]
        for kind in ("partial_fc", "full", "mhs_gather"):
            common = [classes for classes in sizes if (kind, classes) in figures]
            for classes in common[-1:]:
                times = figures[kind, classes]["step"] / figures["mhs", classes]["step"]
                over = f"{NAMES[kind]} over mhs route, {count(classes)} classes"
                found.append((over, f"{times:.1f} x the time"))
        if results[0].case.memory != "file":
            over = f"mhs route, {count(sizes[-1])} classes, all that it takes over rows and state"
            found.append((over, f"{largest['peak'] / largest['bank']:.2f} x the memory"))
    if turns.bare:
        times = turns.bare["step"] / turns.bare["bare"]
        found.append(("mhs route on one rank over its bare products", f"{times:.2f} x the time"))
    return found


def plot(results: Sequence[Result], file: Path) -> None:
    """Time and peak memory over the number of classes, both axes logarithmic, as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8))
        left, right = figure.subplots(1, 2)
        _curves(left, results, "step", "Time per step of the head", "seconds", 1.0)
        _curves(right, results, "peak", "Peak memory, all ranks", "GiB", GIB)
        left.legend(loc="best")
        FigureCanvasAgg(figure).print_figure(file, metadata={"Software": None})


def _curves(
    axes: Axes, results: Sequence[Result], key: str, title: str, unit: str, divisor: float
) -> None:
    for kind in dict.fromkeys(result.case.kind for result in results):
        mine = sorted(
            (r.case.classes, r.figures[key] / divisor) for r in results if r.case.kind == kind
        )
        axes.plot(*zip(*mine, strict=True), marker="o", label=NAMES[kind], color=COLOURS[kind])
    axes.set(title=title, xlabel="classes", ylabel=unit, xscale="log", yscale="log")
    sizes = sorted({result.case.classes for result in results})
    axes.set_xticks(sizes, [count(size) for size in sizes])
    axes.minorticks_off()


def save(results: Sequence[Result], turns: Turns, file: Path) -> None:
    """Everything as JSON."""
    cases = [{"case": asdict(r.case), "figures": r.figures} for r in results]
    found = {"cases": cases, "in_turn": asdict(turns), "ratios": dict(ratios(results, turns))}
    file.write_text(json.dumps(found, indent=2) + "\n")
