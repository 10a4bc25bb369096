"""A run on one HTML page that needs no network: figures, curves, restarts, faults, settings."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
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
from pipelines.report import evaluation as keep
from pipelines.report import plots as report
from pipelines.storage.urls import atomic_write, resolve_url

_PICTURES: Final = {
    "training": ("Training", "Loss, accuracy among the classes seen, learning rate"),
    "throughput": ("Speed", "Images per second, share of the time that is spent waiting for data"),
    "heldout": ("Unseen classes", "Held-out figures over the training, and the ROC of the last"),
    "neighbours": ("Nearest neighbours", "Probes of unseen classes, the gallery's nearest entries"),
}
_FAULT: Final = re.compile(r"bad sample: (?P<place>.*?): (?P<reason>.*)")
_MOST_FAULTS: Final = 50
_RESTART: Final = ("restarts", "restart_lost_steps", "restart_seconds")


@dataclass
class Picture:
    """A PNG in base64, and what it shows."""

    alt: str
    data: str


@dataclass
class Section:
    """A part of the page; what is empty is left out."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    summary: str = ""
    pre: str = ""
    narrow: bool = False


def write(run: str, out: str) -> list[str]:
    """Write the page of a run, complete or not, from its records alone.

    Args:
        run: folder or URL of the run.
        out: path or URL of the page; what is there is replaced.

    Returns:
        Titles of its sections.

    Raises:
        UserError: there is no run, or its records are damaged.
    """
    config = stored_config(yaml.safe_load(_bytes(f"{run}/config.yaml") or b"{}"))
    records = read_records(f"{run}/metrics.jsonl")
    summary = json.loads(_bytes(f"{run}/summary.json") or b"{}")
    sections = [
        *_pictures(run, config),
        *_evaluations(run),
        *_exports(summary),
        _restarts(records),
        _faults(run),
        _settings(config),
    ]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    ).get_template("page.html.j2")
    page = template.render(
        name=config.run.name,
        subtitle=_subtitle(config, records, summary),
        tiles=list(_tiles(records, summary)),
        sections=sections,
    )
    with atomic_write(out) as stream:
        stream.write(page.encode())
    return [section.title for section in sections]


def _subtitle(config: Config, records: report.Records, summary: dict[str, Any]) -> str:
    data = f"{summary['classes']:,} classes, {summary['samples']:,} images; " if summary else ""
    state = "complete" if summary else f"under way or interrupted, {_steps(records):,} steps so far"
    return f"{data}{config.model.name} under {config.head.kind}, {config.head.margin.kind}; {state}"


def _steps(records: report.Records) -> int:
    return max((record["step"] + 1 for record in records if "loss" in record), default=0)


def _tiles(records: report.Records, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures that matter, as (name, value)."""
    heldout = {key[8:]: value for r in records for key, value in r.items() if key[:8] == "heldout/"}
    for key, name in report.HELDOUT:
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
    yield "steps", f"{_steps(records):,}"
    rates = sorted(record["images_per_s"] for record in records if "images_per_s" in record)
    if rates:
        yield "images per second, median", f"{rates[len(rates) // 2]:,.0f}"
    if summary:
        yield "workers", str(summary["world_size"])
        yield "minutes in all", f"{sum(summary['phases'].values()) / 60:.1f}"


def _pictures(run: str, config: Config) -> Iterator[Section]:
    """The pictures that `mhe train` draws too, drawn again from the records."""
    with TemporaryDirectory() as folder:
        for name in ("metrics.jsonl", "evaluation.npz"):
            if (content := _bytes(f"{run}/{name}")) is not None:
                Path(folder, name).write_bytes(content)
        drawn = {path.stem: path for path in report.draw(folder, config)}
        for name, (title, text) in _PICTURES.items():
            if name in drawn:
                yield Section(title, text, [_picture(title, drawn[name].read_bytes())])


def _evaluations(run: str) -> Iterator[Section]:
    """What `mhe evaluate` left beside the run."""
    filesystem, path = resolve_url(f"{run}/{keep.FOLDER}")
    if not filesystem.isdir(path):
        return
    for name in sorted(filesystem.glob(f"{path}/*.json")):
        found = json.loads(filesystem.cat_file(name))
        stem = name.rpartition("/")[2].removesuffix(".json")
        drawn = _bytes(f"{run}/{keep.FOLDER}/{stem}.png")
        rows = [[key, _shown(value)] for key, value in _flat(found["results"])]
        yield Section(
            f"Evaluation: {stem}",
            f"Checkpoint of step {found['step']:,}",
            [_picture(f"ROC of {stem}", drawn)] if drawn else [],
            ["figure", "value"],
            rows,
            narrow=True,
        )


def _exports(summary: dict[str, Any]) -> Iterator[Section]:
    exports = summary.get("exports") or {}
    rows = [[name, e["path"], f"{e['max_difference']:.1e}"] for name, e in exports.items()]
    if rows:
        head = ["format", "path", "largest difference from the trained model"]
        yield Section("Exported backbone", "", [], head, rows)


def _restarts(records: report.Records) -> Section:
    rows = [
        [f"{record['step'] + 1:,}", *(_shown(record.get(key, "")) for key in _RESTART)]
        for record in records
        if any(key in record for key in _RESTART)
    ]
    head = ["step", "restarts so far", "steps done again", "seconds until the next step"]
    return Section("Restarts", "" if rows else "None is recorded.", [], head if rows else [], rows)


def _faults(run: str) -> Section:
    """Bad samples, from the logs of the ranks: each place once."""
    found: dict[str, str] = {}
    filesystem, path = resolve_url(f"{run}/logs")
    for name in sorted(filesystem.glob(f"{path}/rank_*.log")):
        for match in _FAULT.finditer(filesystem.cat_file(name).decode(errors="replace")):
            found[match["place"]] = match["reason"]
    rows = [[place, reason] for place, reason in list(found.items())[:_MOST_FAULTS]]
    text = f"{len(found):,} samples could not be used." if found else "None is in the logs."
    if len(found) > _MOST_FAULTS:
        text += f" The first {_MOST_FAULTS}:"
    return Section("Bad samples", text, [], ["place", "reason"] if rows else [], rows)


def _settings(config: Config) -> Section:
    """What differs from the defaults as a table, everything as YAML."""
    rows = [
        [entry.path, _shown(entry.value)]
        for entry in describe_config(config)
        if entry.value != entry.default
    ]
    return Section(
        *("Settings", "What differs from the defaults:", [], ["key", "value"], rows),
        *("all settings", config_to_yaml(config)),
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.5g}"
    return f"{value:,}" if type(value) is int else str(value)


def _picture(alt: str, content: bytes) -> Picture:
    return Picture(alt, base64.b64encode(content).decode())


def _bytes(url: str) -> bytes | None:
    filesystem, path = resolve_url(url)
    return bytes(filesystem.cat_file(path)) if filesystem.exists(path) else None
