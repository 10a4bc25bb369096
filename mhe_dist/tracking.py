"""Where the record of a run goes: one small protocol, and trackers that can be combined.

`metrics.jsonl` in the run's folder is the record that everything else can be rebuilt from; MLflow
(`tracking_mlflow.py`) shows the same to people. Neither holds up a step.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import fsspec

from mhe_dist.config import Config
from mhe_dist.errors import RunError, UserError
from mhe_dist.mirror import Mirror

logger = logging.getLogger(__name__)

Status = Literal["finished", "failed", "killed"]
Metrics = Mapping[str, float]
COMMIT_VARIABLE = "MHE_GIT_COMMIT"
"""Says the commit of code that was sent to a cluster without its repository."""
_VERSIONED = ("torch", "deepspeed", "ray", "webdataset", "timm", "torchmetrics", "mlflow", "mhe")


@runtime_checkable
class Tracker(Protocol):
    """What keeps the record of a run."""

    @property
    def run_id(self) -> str | None:
        """What names the run, to go on with it after a restart; None where nothing does."""
        ...

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Begin the record, or go on with it.

        Args:
            config: the whole config as nested plain values; secrets are masked here.
            tags: facts about the run that are not config (versions, data digest).
            step: first step that this process records; what was recorded from there on by a
                process that went further than its last checkpoint is superseded.
        """
        ...

    def log(self, step: int, metrics: Metrics) -> None:
        """Record values of a step; returns at once."""
        ...

    def artifact(self, path: str, folder: str = "") -> None:
        """Keep a copy of a file or of a folder, under `folder`; it must not change afterwards."""
        ...

    def model(self, path: str, name: str) -> None:
        """Keep a copy of an MLflow model's folder and register it; it must not change afterwards.

        Args:
            path: the folder (`mhe_dist.mlflow_model.write`).
            name: of the registered model, which gets a new version.
        """
        ...

    def close(self, status: Status = "finished") -> None:
        """Say how the run ended and see the record safely stored."""
        ...


class NullTracker:
    """Keeps nothing: for all ranks but the first, and for tests."""

    run_id: str | None = None

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Keep nothing."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Keep nothing."""

    def artifact(self, path: str, folder: str = "") -> None:
        """Keep nothing."""

    def model(self, path: str, name: str) -> None:
        """Keep nothing."""

    def close(self, status: Status = "finished") -> None:
        """Keep nothing."""


class JsonlTracker:
    """One JSON line for each `log`: `{"step": 10, "time": <Unix seconds>, "loss": 4.2}`.

    Every line is handed to the operating system before `log` returns, so it outlives the process
    (at a URL, the last minute may not: see `mirror.py`). Floats keep all their digits; what is not
    finite is written as `"nan"`, `"inf"`, `"-inf"`.
    """

    run_id: str | None = None

    def __init__(self, path: str) -> None:
        """Args: path: the file, or its fsspec URL; its folder is made when it is missing."""
        self._name = path
        self._path = Path(path)
        self._mirror: Mirror | None = None
        if "://" in path:
            self._path = Path(tempfile.mkdtemp(prefix="mhe-")) / self._path.name
            self._mirror = Mirror(self._path, path)
        self._file: FileIO | None = None
        self._waiting, self._refused = "", False

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Drop the lines of steps >= `step` and open the file; config and tags are not its."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._mirror:
            self._mirror.fetch()
        kept = [r for r in read_records(self._path) if r["step"] < step]
        _replace(self._path, "".join(map(_line, kept)))
        self._file = self._path.open("ab", buffering=0)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line; where the disk refuses it, it waits for the next one, and that is told.

        Raises:
            RunError: there is no `start` before.
        """
        if self._file is None:
            raise RunError(f"{self._name}: log() before start()")
        self._waiting += _line({"step": step, "time": round(time.time(), 3), **metrics})
        self._write()
        if self._mirror:
            self._mirror.update()

    def _write(self) -> None:
        """Write what waits as a whole or not at all."""
        assert self._file is not None
        size, data = os.fstat(self._file.fileno()).st_size, self._waiting.encode()
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            if not self._refused:
                logger.error("%s: cannot be written, will go on trying: %s", self._name, error)
            self._refused = True
        else:
            self._waiting, self._refused = "", False

    def artifact(self, path: str, folder: str = "") -> None:
        """Nothing: the run's folder holds its files already."""

    def model(self, path: str, name: str) -> None:
        """Nothing: the run's folder holds it already."""

    def close(self, status: Status = "finished") -> None:
        """Close the file."""
        if self._file is not None:
            self._write()
            self._file.close()
            self._file = None
            if self._mirror:
                self._mirror.finish()


class Trackers:
    """Several trackers as one. All are closed, even when one of them fails to."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        """Args: trackers: called in this order."""
        self._trackers = list(trackers)

    @property
    def run_id(self) -> str | None:
        """The first run id that one of the trackers has."""
        ids = (tracker.run_id for tracker in self._trackers)
        return next((run_id for run_id in ids if run_id), None)

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Start each."""
        for tracker in self._trackers:
            tracker.start(config, tags, step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def artifact(self, path: str, folder: str = "") -> None:
        """Hand the file or folder to each."""
        for tracker in self._trackers:
            tracker.artifact(path, folder)

    def model(self, path: str, name: str) -> None:
        """Hand the model to each."""
        for tracker in self._trackers:
            tracker.model(path, name)

    def close(self, status: Status = "finished") -> None:
        """Close each, in order; the first failure is raised when all have been asked."""
        with ExitStack() as stack:
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close, status)


def open_tracker(config: Config, is_first: bool, run_id: str | None = None) -> Tracker:
    """The trackers that a config asks for; on all ranks but the first one that keeps nothing.

    Args:
        config: of the run.
        is_first: whether this rank speaks for the run.
        run_id: MLflow run to go on with; None: a new one.

    Raises:
        UserError: the tracking URI cannot be used, or none is given and `run.dir` is a URL.
    """
    if not is_first:
        return NullTracker()
    trackers: list[Tracker] = [JsonlTracker(f"{config.run.path}/metrics.jsonl")]
    if config.tracking.mlflow:
        trackers.append(_mlflow(config, run_id))
    return Trackers(trackers)


def _mlflow(config: Config, run_id: str | None) -> Tracker:
    from mhe_dist.spool import Spool
    from mhe_dist.tracking_mlflow import MlflowTracker

    remote = "://" in config.run.dir
    return MlflowTracker(
        uri=mlflow_uri(config),
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        run_id=run_id,
        artifacts="" if remote else f"{config.run.dir}/mlartifacts",
        spool=None if remote else Spool(Path(config.run.path) / "mlflow"),
    )


def sync(config: Config) -> int:
    """Send what of a run's metrics waits on disk for MLflow; the number of records.

    Raises:
        RunError: MLflow has not taken all of them.
    """
    from mhe_dist.spool import Spool

    spool = Spool(Path(config.run.path) / "mlflow")
    waiting = len(spool)
    if waiting:
        tracker = _mlflow(config, None)
        tracker.start(config.model_dump(mode="json"), {}, step=sys.maxsize)
        tracker.close()
        if len(spool):
            raise RunError(f"{len(spool)} of {waiting} records still wait: see the log")
    return waiting


def mlflow_uri(config: Config) -> str:
    """`tracking.uri`, or `MLFLOW_TRACKING_URI`, or SQLite in `run.dir`, in that order.

    Raises:
        UserError: neither is set and `run.dir` is a URL, where SQLite cannot live.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri
    if "://" in config.run.dir:
        raise UserError(
            f"run.dir={config.run.dir!r} is a URL, where MLflow cannot keep its SQLite file: set "
            "tracking.uri or MLFLOW_TRACKING_URI to an MLflow server, or tracking.mlflow=false"
        )
    folder = Path(config.run.dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def environment_tags() -> dict[str, str]:
    """Versions of the libraries, and the git commit of this code where that is known."""
    return dict(_environment())


@cache
def _environment() -> dict[str, str]:
    tags = {}
    for package in _VERSIONED:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD") if _git("ls-files", Path(__file__).name) else ""
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["git_commit"] = f"{commit}-dirty" if changed else commit
    elif sent := os.environ.get(COMMIT_VARIABLE):
        tags["git_commit"] = sent
    return tags


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, a path or fsspec URL, in their order; none without a file.

    A last line that a killed process left unfinished is ignored.

    Raises:
        UserError: a line that is not the last is no record.
    """
    filesystem, place = fsspec.core.url_to_fs(str(path))
    if not filesystem.exists(place):
        return []
    lines = filesystem.cat_file(place).decode().split("\n")
    return [_record(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _record(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        values = {k: float(v) if isinstance(v, str) else v for k, v in record.items()}
        return values | {"step": int(record["step"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}:{number}: not a record ({error}): move the file away, or remove the line"
        ) from error


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n"


def _plain(value: float) -> float | int | str:
    return value if math.isfinite(value) else str(float(value))


def _replace(path: Path, text: str) -> None:
    """Write the whole file so that a crash leaves either the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _git(*arguments: str) -> str:
    """What git says in this file's folder; empty where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
