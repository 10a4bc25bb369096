"""Runs on disk: where one is, what it was told, whether it is complete."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mhe_dist.checkpoint.step_folder import (
    MANIFEST,
    describe_missing_step,
    folder_of_step,
    list_steps,
    step_of,
)
from mhe_dist.config.schema import Config
from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError, first_line
from mhe_dist.storage_errors import ABSENT, is_transient
from mhe_dist.storage_retry import until_answered
from pipelines.runs.no_run import describe_what_is_there
from pipelines.storage.urls import (
    is_absolute_url,
    is_local,
    is_local_url,
    is_web,
    resolve_url,
    url_exists,
)

RUNS_FOLDER = "runs"
_WRITTEN = ".written"  # to see whether a store takes files
_WEB = "a web server takes no files"


def read_if_exists(url: str) -> str | None:
    """Text of a file, None if it does not exist.

    Raises:
        UserError: there is no file system for such a URL, or the file is no text.
        StorageUnavailable: the disk or the store gives no answer.
    """
    filesystem, path = resolve_url(url)
    try:
        return until_answered(lambda: bytes(filesystem.cat_file(path)), url).decode()
    except ABSENT:
        return None
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}") from error


def absolute_path(url: str) -> str:
    """The same place, whatever the working directory is."""
    filesystem, path = resolve_url(url)
    return str(Path(path).absolute()) if is_local(filesystem) else url


def make_run_folder(config: Config) -> None:
    """Make the folder of a run before anything else is begun; a store makes it as it is written.

    Raises:
        UserError: it cannot be made or written. A store that does not answer may do so later.
    """
    cure = "name another folder with run.dir"
    try:
        filesystem, path = resolve_url(config.run.path)
    except UserError as error:
        raise UserError(f"run.dir={config.run.dir}: {error}; {cure}") from error
    if is_web(filesystem):
        raise UserError(f"run.dir={config.run.dir}: {_WEB}; {cure}")
    if not is_local(filesystem):
        if reason := why_not_writable(config.run.path):
            raise UserError(
                f"run.dir={config.run.dir}: {config.run.path} cannot be written ({reason}); {cure}"
            )
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        reason = f"{path} cannot be made ({error.strerror})"
        raise UserError(f"run.dir={config.run.dir}: {reason}; {cure}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={config.run.dir}: {path} may not be written; {cure}")


def why_not_writable(url: str) -> str:
    """What a store says when a small file is written into a folder; empty: it may be written.

    A folder of this machine is not looked at.
    """
    filesystem, folder = resolve_url(url)
    if is_local(filesystem):
        return ""
    if is_web(filesystem):
        return _WEB
    try:
        filesystem.pipe_file(f"{folder}/{_WRITTEN}", b"")
    except Exception as error:  # every store has errors of its own
        return "" if is_transient(error) else first_line(error)
    with suppress(Exception):  # who may not delete keeps one empty file
        filesystem.rm_file(f"{folder}/{_WRITTEN}")
    return ""


def logs_folder(config: Config) -> Path:
    """Local folder of a run's log files: `logs` in it, or a temporary one for a run at a URL."""
    if is_local_url(config.run.path):
        return Path(absolute_path(config.run.path)) / "logs"
    return Path(tempfile.gettempdir()) / "mhe-logs" / config.run.name


def read_summary(path: str) -> dict[str, Any] | None:
    """What a complete run achieved; None while it is not complete."""
    text = read_if_exists(f"{path}/summary.json")
    return json.loads(text) if text else None


def read_heldout_figures(path: str, step: int) -> tuple[dict[str, float], str]:
    """Held-out figures of a run at a step, and their protocol in words; empty: none are known.

    Those of `mhe evaluate` on the set of the run come before those of the run's end.
    """
    found = json.loads(read_if_exists(f"{path}/evaluation/heldout.json") or "{}")
    results = found.get("results", {})
    its_own = (read_run_config(path) or {}).get("evaluate", {}).get("shards")
    if found.get("step") == step and results.get("shards") == its_own:
        figures = {name: value for name, value in results.items() if isinstance(value, float)}
        return figures, results.get("protocol", "")
    summary = read_summary(path) or {}
    if summary.get("steps") == step:
        return summary.get("heldout", {}), summary.get("protocol") or ""
    return {}, ""


def read_run_config(path: str) -> dict[str, Any] | None:
    """The config that a run at `path` was started with; None where there is no run."""
    text = read_if_exists(f"{path}/config.yaml")
    return yaml.safe_load(text) if text else None


def config_at(config: Config, path: str) -> Config:
    """The config of a run that is at `path` by now, whatever folder it was trained in."""
    folder, _, name = absolute_path(path).rpartition("/")
    run = config.run.model_copy(update={"dir": folder or "/", "name": name})
    return config.model_copy(update={"run": run})


def newest_checkpoint(path: str) -> str | None:
    """Folder of a run's newest complete checkpoint, judged by its manifest alone, or None.

    The trainer also compares the checksums, and takes an older one where they do not fit.

    Raises:
        UserError, StorageUnavailable: that cannot be told; see `url_exists`.
    """
    root = f"{path}/checkpoints"
    folders = (f"{root}/{folder_of_step(step)}" for step in list_steps(root))
    return next((folder for folder in folders if url_exists(f"{folder}/{MANIFEST}")), None)


def find_checkpoint_folder(url: str) -> str:
    """The folder of a checkpoint, named by its own URL or by its run (then the newest).

    Raises:
        UserError: there is no such folder, no run, or it has no complete checkpoint yet.
    """
    url = local_path(url.rstrip("/"))
    if step_of(url) is not None:
        if missing := describe_missing_step(url):
            raise UserError(missing)
        return url
    newest = newest_checkpoint(find_run(url))
    if newest is None:
        raise UserError(f"{url} has no complete checkpoint yet")
    return newest


def find_run(run: str) -> str:
    """Path of a run that is named by its path, its URL or its name in `runs/`.

    Of a `file://` URL it is the path that it names.

    Raises:
        UserError: there is no run; the message says where it was looked for, and what is there.
    """
    folders = [local_path(run.rstrip("/"))]
    if not is_absolute_url(run):
        folders.append(f"{RUNS_FOLDER}/{run}")
    for folder in folders:
        if url_exists(f"{folder}/config.yaml"):
            return folder
    raise UserError(
        f"no run at {' or '.join(folders)} (a run holds a config.yaml): "
        f"{describe_what_is_there(run, RUNS_FOLDER)}"
    )
