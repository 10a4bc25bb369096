"""What a run achieved, as the last screen of `mhe train` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from launcher.terminal import console
from launcher.terminal.commands import fetched_name, fetching_code, is_in_store, loading_code
from launcher.terminal.progress import accuracy_rows, format_duration
from mhe_dist.config.schema import Config
from mhe_dist.tracking.factory import count_waiting
from pipelines.runs.folder import logs_folder

Row = tuple[str, str]


def show_summary(config: Config, summary: dict[str, Any]) -> None:
    """Print the figures of a complete run, where everything is, and what to type next."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary_rows(summary):
        table.add_row(escape(name), escape(value))
    console.out.print()
    console.show_table(f"Run {config.run.name}", table)
    console.list_rows("Where it is", result_paths(config, summary))
    console.list_next(next_steps(config, summary))


def summary_rows(summary: dict[str, Any]) -> Iterator[Row]:
    """The rows of the table."""
    training, heldout = summary["training"], summary["heldout"]
    yield "steps", f"{summary['steps']:,} on {summary['world_size']} workers"
    yield "data", f"{summary['samples']:,} images of {summary['classes']:,} classes"
    if "loss" in training:
        yield "loss", f"{training['loss']:.3f}"
    if heldout:
        yield from accuracy_rows(heldout)
    if summary.get("protocol"):
        yield "protocol of rank-1, TAR", summary["protocol"]
    yield "bad samples", f"{summary.get('bad_samples', 0):,}"
    yield "speed", f"{summary['images_per_s']:,.0f} images/s"
    if "device" in summary:  # runs of earlier versions do not say it
        yield "device", summary["device"]
    phases = summary["phases"].items()
    yield "time", ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in phases)
    for failure in summary.get("failed_checkpoints", []):
        yield "checkpoint that failed", failure
    for message in summary.get("warnings", []):
        yield "warning", message
    if summary["resumed_from"]:
        yield "resumed from", summary["resumed_from"]


def result_paths(config: Config, summary: dict[str, Any]) -> Iterator[Row]:
    """Where the results are."""
    path = config.run.path
    for name, export in summary["exports"].items():
        yield f"backbone ({name})", export["path"]
    yield "pictures", f"{path}/plots"
    yield "metrics, one line per step", f"{path}/metrics.jsonl"
    if summary.get("bad_samples"):
        yield "bad samples by name", f"{path}/bad_samples.jsonl"
    yield "checkpoints", summary["checkpoints"]
    yield "settings", f"{path}/config.yaml"
    yield "logs", str(logs_folder(config)) if is_in_store(path) else f"{path}/logs"


def next_steps(config: Config, summary: dict[str, Any]) -> Iterator[tuple[str, str | list[str]]]:
    """What to do next: words of a command, or a link."""
    path, exports = config.run.path, summary["exports"]
    if summary["mlflow"]:
        if count_waiting(config):
            yield "send MLflow what it lacks, once it runs", ["mhe", "sync", path]
        yield from _curves(summary["mlflow"])
    if config.tracking.tensorboard:
        yield "see them in TensorBoard", ["tensorboard", "--logdir", config.run.dir]
    if "timm" in exports:
        export = exports["timm"]["path"]
        if is_in_store(export):
            yield "fetch the backbone", ["python", "-c", fetching_code(export)]
        code = loading_code("timm", fetched_name(export), config.model.name)
        yield "use the backbone", ["python", "-c", code]
    yield "see it on a page", ["mhe", "report", path]
    if summary["heldout"]:
        yield "evaluate again", ["mhe", "evaluate", *_evaluation(config, path)]
    yield "export again", ["mhe", "export", path]
    if config.data.glyphs is not None:
        yield "other fonts as data", ["mhe", "data", "glyphs", "--fonts", "DIR", "--out", "DIR"]


def _evaluation(config: Config, path: str) -> list[str]:
    """Words after `mhe evaluate`: an evaluation that the run itself made."""
    settings = config.evaluate
    if settings.shards:
        return [path]
    if settings.verification:
        return ["verification", path, "--sets", *settings.verification]
    if settings.classification:
        return ["classification", path, "--shards", settings.classification]
    if settings.labels:
        return ["labels", path, "--shards", settings.labels, "--labels", settings.label_set]
    return [path]


def _curves(mlflow: dict[str, Any]) -> Iterator[tuple[str, str | list[str]]]:
    """The page of a run on a server; of a local store the command that serves it, then the page."""
    uri, page = str(mlflow["uri"]).rstrip("/"), mlflow.get("page")  # a run of before has none
    if uri.startswith(("http://", "https://")):
        yield "see the curves", f"{uri}/{page}" if page else uri
        return
    yield "serve the curves", ["mlflow", "ui", "--backend-store-uri", mlflow["uri"]]
    if page:
        yield "then see them", f"http://127.0.0.1:5000/{page}"
