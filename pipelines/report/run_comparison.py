"""Writes one HTML page about several runs: figures side by side, curves over each other, settings.

It is made from the runs' records alone, as the page of one run is, and needs no network.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import yaml

from mhe_dist.config.describe import describe_config
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.tracking.base import HELDOUT
from mhe_dist.tracking.jsonl import read_records
from pipelines.report.charts.lines import draw_lines
from pipelines.report.charts.numbers import format_share, format_value
from pipelines.report.charts.run_charts import Positions, compared_chart
from pipelines.report.comparison import training_seconds
from pipelines.report.html import steps_done
from pipelines.report.page import PageSection, read_bytes, write_page
from pipelines.report.plots import HELDOUT_FIGURES, Records, series

_NONE: Final = "-"  # a figure that a run does not have, a setting that does not apply to it
_NO_SETTING: Final = {"run.name", "run.dir"}  # they differ always, and change nothing


@dataclass
class RecordedRun:
    """What is known of a run.

    Attributes:
        label: of its curves and columns.
        config: that it was started with.
        records: lines of its `metrics.jsonl`.
        summary: of its end; empty while there is none.
    """

    label: str
    config: Config
    records: Records
    summary: dict[str, Any]

    def last(self, key: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        values = series(self.records, key)[1]
        return float(values[-1]) if len(values) else None


def write_comparison_page(runs: Sequence[str], out: str) -> list[str]:
    """Write the page of several runs, complete or not.

    Args:
        runs: folders or URLs of the runs, in the order of the columns.
        out: path or URL of the page; an existing file is replaced.

    Returns:
        Titles of its sections.

    Raises:
        UserError: the records of a run are damaged.
    """
    found = _read_runs(runs)
    sections = [
        _figures_section(found),
        *_curve_sections(found),
        _settings_section(found),
        PageSection("Runs", rows=[[r.label, url] for r, url in zip(found, runs, strict=True)]),
    ]
    title = " and ".join(run.label for run in found) if len(found) == 2 else f"{len(found)} runs"
    write_page(out, title, "compared by mhe report", [], sections)
    return [section.title for section in sections]


def _read_runs(urls: Sequence[str]) -> list[RecordedRun]:
    """The runs, labelled by name; by folder where two have the same name."""
    configs = [stored_config(yaml.safe_load(read_bytes(f"{u}/config.yaml") or b"{}")) for u in urls]
    names = Counter(config.run.name for config in configs)
    return [
        RecordedRun(
            config.run.name if names[config.run.name] == 1 else url,
            config,
            read_records(f"{url}/metrics.jsonl"),
            json.loads(read_bytes(f"{url}/summary.json") or b"{}"),
        )
        for url, config in zip(urls, configs, strict=True)
    ]


def _figures_section(runs: Sequence[RecordedRun]) -> PageSection:
    """A row for each figure that one of the runs has, a column for each run."""
    names = dict.fromkeys(name for run in runs for name, _ in _figures(run))
    columns = [dict(_figures(run)) for run in runs]
    rows = [[name, *(column.get(name, _NONE) for column in columns)] for name in names]
    return PageSection("Figures", head=["", *(run.label for run in runs)], rows=rows)


def _figures(run: RecordedRun) -> Iterator[tuple[str, str]]:
    """Figures of a run as (name, value), the held-out ones and their protocol first."""
    for key, name in HELDOUT_FIGURES:
        if (value := run.last(f"{HELDOUT}{key}")) is not None:
            yield f"{name}, unseen classes", format_share(value)
    if protocol := run.summary.get("protocol"):
        yield "protocol of rank-1, TAR", protocol
    others = {
        key.removeprefix(HELDOUT)
        for record in run.records
        for key in record
        if key.startswith(HELDOUT)
    }
    for key in sorted(others):
        value = run.last(f"{HELDOUT}{key}")
        if value is not None and key.endswith(("/rank1", "/accuracy", "/top1")):
            name = key.replace("/rank1", ": rank-1").replace("/top1", ": top-1")
            yield name, format_share(value)
    if (loss := run.last("loss")) is not None:
        yield "training loss, last step", f"{loss:.3f}"
    done = f"{steps_done(run.records):,}"
    yield "steps", done if run.summary else f"{done}, not complete"
    rates = series(run.records, "images_per_s")[1]
    if len(rates):
        yield "images per second, median", f"{np.median(rates):,.0f}"
    if run.summary:
        seconds = training_seconds(run.records, run.config.train.global_batch)
        yield "minutes of training", f"{seconds / 60:.1f}"
        yield "workers", str(run.summary["world_size"])
        if "device" in run.summary:  # runs of earlier versions do not say it
            yield "device", run.summary["device"]
        yield "images", f"{run.summary['samples']:,}"
        yield "classes", f"{run.summary['classes']:,}"


def _curve_sections(runs: Sequence[RecordedRun]) -> Iterator[PageSection]:
    """Curves of all runs over each other, a panel for each metric that one of them has."""
    positions, unit = _positions(runs)
    recorded = [(run.label, run.records) for run in runs]
    panels = {
        "Training": [
            ("loss", "Training loss"),
            ("accuracy", "Training accuracy, classes seen"),
            ("doubted", "Doubted labels"),
        ],
        "Unseen classes": [(f"{HELDOUT}{key}", name) for key, name in HELDOUT_FIGURES],
        "Speed": [("images_per_s", "Images per second")],
    }
    for title, metrics in panels.items():
        shown = [(k, n) for k, n in metrics if any(k in r for run in runs for r in run.records)]
        drawn = [
            draw_lines(compared_chart(recorded, key, name, unit, positions)) for key, name in shown
        ]
        if drawn:
            yield PageSection(title, charts=drawn)


def _positions(runs: Sequence[RecordedRun]) -> tuple[Positions, str]:
    """Where a step is on the axis: images seen, if steps of the runs are of different sizes."""
    if len({run.config.train.global_batch for run in runs}) == 1:
        return lambda number, steps: steps, "step"
    return lambda number, steps: steps * runs[number].config.train.global_batch, "images seen"


def _settings_section(runs: Sequence[RecordedRun]) -> PageSection:
    """The settings in which the runs differ."""
    columns = [
        {entry.path: format_value(entry.value) for entry in describe_config(run.config)}
        for run in runs
    ]
    paths = dict.fromkeys(path for column in columns for path in column)
    rows = [
        [path, *values]
        for path in paths
        if path not in _NO_SETTING
        and len(set(values := [column.get(path, _NONE) for column in columns])) > 1
    ]
    if not rows:
        return PageSection("Settings", "They are the same.")
    return PageSection(
        "Settings", "In which the runs differ:", head=["key", *(r.label for r in runs)], rows=rows
    )
