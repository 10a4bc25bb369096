"""Writes one HTML page about a run that needs no network: figures, curves, restarts, settings."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import jinja2
import yaml

from mhe_dist.config.describe import describe_config
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.tracking.jsonl import read_records
from pipelines.data.bad_samples import BAD_SAMPLES_FILE
from pipelines.report.evaluation import EVALUATION_FOLDER
from pipelines.report.plots import HELDOUT, Records, draw_plots, series
from pipelines.storage.urls import atomic_write, list_folder, resolve_url

_PICTURES: Final = {
    "training": ("Training", "Loss, accuracy among the classes seen, learning rate"),
    "throughput": ("Speed", "Images per second, share of the time that is spent waiting for data"),
    "heldout": ("Unseen classes", "Held-out figures over the training, and the ROC of the last"),
    "neighbours": ("Nearest neighbours", "Probes of unseen classes, the gallery's nearest entries"),
}
_MAX_BAD_SAMPLES: Final = 50
_RESTART: Final = ("restarts", "restart_lost_steps", "restart_seconds")


@dataclass
class Picture:
    """A PNG in base64, and the text that describes it."""

    alt: str
    data: str


@dataclass
class PageSection:
    """A section of the page; the template leaves out what is empty."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    summary: str = ""
    pre: str = ""
    narrow: bool = False


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
        *_picture_sections(run, config, summary.get("protocol", "")),
        *_evaluation_sections(run),
        *_export_sections(summary),
        _restarts_section(records),
        _bad_samples_section(run, records),
        _settings_section(config),
    ]
    subtitle = _subtitle(config, records, summary)
    write_page(out, config.run.name, subtitle, list(_tiles(records, summary)), sections)
    return [section.title for section in sections]


def write_page(
    out: str,
    name: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[PageSection],
) -> None:
    """Write a page from its parts; an existing file is replaced.

    Args:
        out: path or URL of the page.
        name: its title.
        subtitle: below the title.
        tiles: the most important figures, as (name, value).
        sections: in their order.
    """
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    ).get_template("page.html.j2")
    page = template.render(name=name, subtitle=subtitle, tiles=tiles, sections=sections)
    with atomic_write(out) as stream:
        stream.write(page.encode(errors="backslashreplace"))  # names need not be UTF-8


def _subtitle(config: Config, records: Records, summary: dict[str, Any]) -> str:
    data = f"{summary['classes']:,} classes, {summary['samples']:,} images; " if summary else ""
    state = (
        "complete" if summary else f"under way or interrupted, {steps_done(records):,} steps so far"
    )
    return f"{data}{config.model.name} under {config.head.kind}, {config.head.margin.kind}; {state}"


def steps_done(records: Records) -> int:
    """Steps of a run that its records have."""
    return max((record["step"] + 1 for record in records if "loss" in record), default=0)


def _tiles(records: Records, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The most important figures, as (name, value)."""
    heldout = {key[8:]: value for r in records for key, value in r.items() if key[:8] == "heldout/"}
    for key, name in HELDOUT:
        if key in heldout:
            yield f"{name}, unseen classes", f"{heldout[key]:.1%}"
    if "chance" in heldout:
        yield "chance of rank-1", f"{heldout['chance']:.1%}"
    for key, value in heldout.items():
        if key.endswith("/accuracy"):
            yield key.removesuffix("/accuracy"), f"{value:.2%}"
    losses = [record["loss"] for record in records if "loss" in record]
    if losses:
        yield "training loss, last step", f"{losses[-1]:.3f}"
    yield "steps", f"{steps_done(records):,}"
    rates = sorted(record["images_per_s"] for record in records if "images_per_s" in record)
    if rates:
        yield "images per second, median", f"{rates[len(rates) // 2]:,.0f}"
    if summary:
        yield "workers", str(summary["world_size"])
        yield "minutes in all", f"{sum(summary['phases'].values()) / 60:.1f}"


def _picture_sections(run: str, config: Config, protocol: str) -> Iterator[PageSection]:
    """The plots that `mhe train` draws too, drawn again from the records."""
    with TemporaryDirectory() as folder:
        for name in ("metrics.jsonl", "evaluation.npz"):
            if (content := read_bytes(f"{run}/{name}")) is not None:
                Path(folder, name).write_bytes(content)
        paths = draw_plots(folder, config.evaluate.shards, config.data.image_size)
        drawn = {path.stem: path for path in paths}
        for name, (title, text) in _PICTURES.items():
            if name in drawn:
                says = f" ({protocol})" if name == "heldout" and protocol else ""
                yield PageSection(
                    title, f"{text}{says}", [picture(title, drawn[name].read_bytes())]
                )


def _evaluation_sections(run: str) -> Iterator[PageSection]:
    """The results that `mhe evaluate` saved beside the run."""
    folder = f"{run}/{EVALUATION_FOLDER}"
    filesystem, _ = resolve_url(folder)
    for name in (name for name in list_folder(folder) if name.endswith(".json")):
        saved = json.loads(filesystem.cat_file(name))
        stem = name.rpartition("/")[2].removesuffix(".json")
        drawn = read_bytes(f"{run}/{EVALUATION_FOLDER}/{stem}.png")
        rows = [[key, format_value(value)] for key, value in _flatten(saved["results"])]
        yield PageSection(
            f"Evaluation: {stem}",
            f"Checkpoint of step {saved['step']:,}",
            [picture(f"ROC of {stem}", drawn)] if drawn else [],
            ["figure", "value"],
            rows,
            narrow=True,
        )


def _export_sections(summary: dict[str, Any]) -> Iterator[PageSection]:
    exports = summary.get("exports") or {}
    rows = [[name, e["path"], f"{e['max_difference']:.1e}"] for name, e in exports.items()]
    if rows:
        head = ["format", "path", "largest difference from the trained model"]
        yield PageSection("Exported backbone", "", [], head, rows)


def _restarts_section(records: Records) -> PageSection:
    rows = [
        [f"{record['step'] + 1:,}", *(format_value(record.get(key, "")) for key in _RESTART)]
        for record in records
        if any(key in record for key in _RESTART)
    ]
    head = ["step", "restarts so far", "steps done again", "seconds until the next step"]
    return PageSection(
        "Restarts", "" if rows else "None is recorded.", [], head if rows else [], rows
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
    return PageSection("Bad samples", text, [], ["sample", "reason"], rows)


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


def format_value(value: Any) -> str:
    """A setting or figure as a cell of a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.5g}"
    return f"{value:,}" if type(value) is int else str(value)


def picture(alt: str, content: bytes) -> Picture:
    """A PNG for a page, with the text that describes it."""
    return Picture(alt, base64.b64encode(content).decode())


def read_bytes(url: str) -> bytes | None:
    """The file at a path or URL; None if there is none."""
    filesystem, path = resolve_url(url)
    return bytes(filesystem.cat_file(path)) if filesystem.exists(path) else None
