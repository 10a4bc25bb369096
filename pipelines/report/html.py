"""Writes one HTML page about a run that needs no network: figures, curves, restarts, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import yaml

from mhe_dist.config.describe import describe_config
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.tracking.base import HELDOUT
from mhe_dist.tracking.jsonl import read_records
from pipelines.data.bad_samples import BAD_SAMPLES_FILE
from pipelines.report.charts.lines import draw_lines
from pipelines.report.charts.numbers import format_figure, format_share, format_value
from pipelines.report.charts.run_charts import (
    heldout_charts,
    roc_chart,
    speed_charts,
    training_charts,
)
from pipelines.report.comparison import training_seconds
from pipelines.report.evaluation import EVALUATION_FOLDER
from pipelines.report.heldout_pictures import heldout_sections
from pipelines.report.page import PageSection, picture, read_bytes, write_page
from pipelines.report.plots import HELDOUT_FIGURES, Records, load_details, series
from pipelines.storage.urls import list_folder, resolve_url

_MAX_BAD_SAMPLES: Final = 50
_RESTART: Final = ("restarts", "restart_lost_steps", "restart_seconds")


def write_run_page(run: str, out: str) -> list[str]:
    """Write the page of a run, complete or not, from its records alone.

    Args:
        run: folder or URL of the run.
        out: path or URL of the page; an existing file is replaced.

    Returns:
        Titles of its sections.

    Raises:
        UserError: there is no run, or its records are damaged.
    """
    config = stored_config(yaml.safe_load(read_bytes(f"{run}/config.yaml") or b"{}"))
    records = read_records(f"{run}/metrics.jsonl")
    summary = json.loads(read_bytes(f"{run}/summary.json") or b"{}")
    sections = [
        *_chart_sections(run, records, summary.get("protocol", "")),
        *_heldout_sections(run, config),
        *_evaluation_sections(run),
        *_export_sections(summary),
        _restarts_section(records),
        _bad_samples_section(run, records),
        _settings_section(config),
    ]
    subtitle = _subtitle(config, records, summary)
    tiles = list(_tiles(records, summary, config.train.global_batch))
    write_page(out, config.run.name, subtitle, tiles, sections)
    return [section.title for section in sections]


def _subtitle(config: Config, records: Records, summary: dict[str, Any]) -> str:
    data = f"{summary['classes']:,} classes, {summary['samples']:,} images; " if summary else ""
    state = f"under way or interrupted, {steps_done(records):,} steps so far"
    if summary:
        device = summary.get("device")  # runs of earlier versions do not say it
        state = f"complete, on {device}" if device else "complete"
    return f"{data}{config.model.name} under {config.head.kind}, {config.head.margin.kind}; {state}"


def steps_done(records: Records) -> int:
    """Steps of a run that its records have."""
    return max((record["step"] + 1 for record in records if "loss" in record), default=0)


def _tiles(records: Records, summary: dict[str, Any], batch: int) -> Iterator[tuple[str, str]]:
    """The most important figures, as (name, value); `batch`: images per step."""
    heldout = {
        key.removeprefix(HELDOUT): value
        for record in records
        for key, value in record.items()
        if key.startswith(HELDOUT)
    }
    for key, name in HELDOUT_FIGURES:
        if key in heldout:
            yield f"{name}, unseen classes", format_share(heldout[key])
    if "chance" in heldout:
        yield "chance of rank-1", format_share(heldout["chance"])
    for key, value in heldout.items():
        if key.endswith("/accuracy"):
            yield key.removesuffix("/accuracy"), format_share(value)
    losses = [record["loss"] for record in records if "loss" in record]
    if losses:
        yield "training loss, last step", f"{losses[-1]:.3f}"
    yield "steps", f"{steps_done(records):,}"
    rates = sorted(record["images_per_s"] for record in records if "images_per_s" in record)
    if rates:
        yield "images per second, median", f"{rates[len(rates) // 2]:,.0f}"
    if summary:
        yield "workers", str(summary["world_size"])
        yield "minutes of training", f"{training_seconds(records, batch) / 60:.1f}"


def _chart_sections(run: str, records: Records, protocol: str) -> Iterator[PageSection]:
    """Curves of the records, and the ROC of the last held-out evaluation."""
    details = load_details(f"{run}/evaluation.npz")
    says = f" ({protocol})" if protocol else ""
    for title, text, charts in (
        (
            "Training",
            "Loss, accuracy among the classes seen, learning rate",
            training_charts(records),
        ),
        (
            "Speed",
            "Images per second, share of the time that is spent waiting for data",
            speed_charts(records),
        ),
        (
            "Unseen classes",
            f"Held-out figures over the training, and the ROC of the last{says}",
            heldout_charts(records, details),
        ),
    ):
        if drawn := [draw_lines(chart) for chart in charts]:
            yield PageSection(title, text, drawn)


def _heldout_sections(run: str, config: Config) -> Iterator[PageSection]:
    """Pictures of the newest evaluation: of `mhe evaluate heldout`, else of the run's end."""
    stem, shards = f"{run}/{EVALUATION_FOLDER}/heldout", config.evaluate.shards
    details = load_details(f"{stem}.npz")
    if details:
        shards = json.loads(read_bytes(f"{stem}.json") or b"{}")["results"]["shards"]
    yield from heldout_sections(details or load_details(f"{run}/evaluation.npz"), shards)


def _evaluation_sections(run: str) -> Iterator[PageSection]:
    """The results that `mhe evaluate` saved beside the run."""
    folder = f"{run}/{EVALUATION_FOLDER}"
    filesystem, _ = resolve_url(folder)
    for name in (name for name in list_folder(folder) if name.endswith(".json")):
        saved = json.loads(filesystem.cat_file(name))
        stem = name.rpartition("/")[2].removesuffix(".json")
        rows = [[key, format_figure(key, value)] for key, value in _flatten(saved["results"])]
        section = PageSection(
            f"Evaluation: {stem}",
            f"Checkpoint of step {saved['step']:,}",
            head=["figure", "value"],
            rows=rows,
        )
        if curves := saved.get("curves"):
            points = {
                each: (np.array(found["far"]), np.array(found["tar"]))
                for each, found in curves.items()
            }
            section.charts.append(draw_lines(roc_chart(f"ROC of {stem}", points)))
        elif drawn := read_bytes(f"{run}/{EVALUATION_FOLDER}/{stem}.png"):
            section.pictures.append(picture(f"ROC of {stem}", drawn))  # of an earlier version
        yield section


def _export_sections(summary: dict[str, Any]) -> Iterator[PageSection]:
    exports = summary.get("exports") or {}
    rows = [[name, e["path"], f"{e['max_difference']:.1e}"] for name, e in exports.items()]
    if rows:
        head = ["format", "path", "largest difference from the trained model"]
        yield PageSection("Exported backbone", head=head, rows=rows)


def _restarts_section(records: Records) -> PageSection:
    rows = [
        [f"{record['step'] + 1:,}", *(format_value(record.get(key, "")) for key in _RESTART)]
        for record in records
        if any(key in record for key in _RESTART)
    ]
    head = ["step", "restarts so far", "steps done again", "seconds until the next step"]
    return PageSection(
        "Restarts", "" if rows else "None is recorded.", head=head if rows else [], rows=rows
    )


def _bad_samples_section(run: str, records: Records) -> PageSection:
    """Bad samples by name, as the run wrote them down, and how often one was drawn."""
    lines = (read_bytes(f"{run}/{BAD_SAMPLES_FILE}") or b"").decode(errors="replace").splitlines()
    samples = [json.loads(line) for line in lines]
    drawn = series(records, "bad_samples")[1]
    if not samples and not (len(drawn) and drawn[-1]):
        return PageSection("Bad samples", "None is recorded.")
    text = f"{len(samples):,} samples could not be used."
    if len(drawn):
        text += f" They were drawn {drawn[-1]:,.0f} times, each time replaced by another."
    if len(samples) > _MAX_BAD_SAMPLES:
        text += f" The first {_MAX_BAD_SAMPLES} of {BAD_SAMPLES_FILE}:"
    rows = [[sample["place"], sample["reason"]] for sample in samples[:_MAX_BAD_SAMPLES]]
    return PageSection("Bad samples", text, head=["sample", "reason"], rows=rows)


def _settings_section(config: Config) -> PageSection:
    """The settings that differ from the defaults as a table, and all of them as YAML."""
    rows = [
        [entry.path, format_value(entry.value)]
        for entry in describe_config(config)
        if entry.value != entry.default
    ]
    return PageSection(
        title="Settings",
        text="What differs from the defaults:",
        head=["key", "value"],
        rows=rows,
        summary="all settings",
        pre=config_to_yaml(config),
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value
