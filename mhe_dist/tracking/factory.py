"""Where the record of a run goes: one small protocol, and trackers that can be combined.

`metrics.jsonl` in the run's folder is the record that everything else can be rebuilt from; MLflow
(`mlflow.py`) and TensorBoard (`tensorboard.py`) show the same to people. No step waits for them.
"""

from __future__ import annotations

import logging
import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from mhe_dist.tracking.artifact_places import follow_artifacts
from mhe_dist.tracking.base import CombinedTrackers, NullTracker, Tracker
from mhe_dist.tracking.jsonl import JsonlTracker
from mhe_dist.tracking.tensorboard import TensorBoardTracker

if TYPE_CHECKING:
    from mhe_dist.tracking.mlflow import MlflowTracker
    from mhe_dist.tracking.spool import Spool

logger = logging.getLogger(__name__)

_DATABASE, _ARTIFACTS = "mlflow.db", "mlartifacts"  # beside the runs


def open_tracker(config: Config, is_first: bool, run_id: str | None = None) -> Tracker:
    """The trackers that a config asks for; on all ranks but the first one that keeps nothing.

    Args:
        config: of the run.
        is_first: whether this rank speaks for the run.
        run_id: MLflow run to go on with; None: a new one.

    Raises:
        UserError: the tracking URI cannot be used, or none is given and `run.dir` is a URL; or
            TensorBoard is asked for where it cannot write or is not installed.
    """
    if not is_first:
        return NullTracker()
    trackers: list[Tracker] = [JsonlTracker(f"{config.run.path}/metrics.jsonl")]
    if config.tracking.mlflow:
        trackers.append(_mlflow(config, run_id))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(f"{config.run.path}/tensorboard"))
    return CombinedTrackers(trackers)


def _mlflow(config: Config, run_id: str | None) -> MlflowTracker:
    from mhe_dist.tracking.mlflow import MlflowTracker

    remote = "://" in config.run.dir
    follow_moved_artifacts(config)
    return MlflowTracker(
        uri=mlflow_uri(config),
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        run_id=run_id,
        artifacts="" if remote else f"{config.run.dir}/{_ARTIFACTS}",
        spool=_spool(config),
    )


def _spool(config: Config) -> Spool | None:
    """Where the metrics of a run wait; None of a run at a URL: nowhere."""
    from mhe_dist.tracking.spool import Spool

    return None if "://" in config.run.dir else Spool(Path(config.run.path) / "mlflow")


def count_waiting(config: Config) -> int:
    """Records of a run of this machine, its end among them, that MLflow lacks so far."""
    spool = _spool(config) if Path(config.run.path).is_dir() else None
    return 0 if spool is None else len(spool) + (spool.end is not None)


def follow_moved_artifacts(config: Config) -> int:
    """Let the database beside the runs find their artifacts after their folder was moved.

    Returns:
        Number of runs whose artifacts have another place now; 0 also where a server keeps them.
    """
    if config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "://" in config.run.dir:
        return 0
    folder = Path(config.run.dir)
    return follow_artifacts(folder / _DATABASE, folder / _ARTIFACTS)


def sync_mlflow(config: Config) -> int:
    """Send the metrics of a run that wait on disk for MLflow; the number of records.

    MLflow's run stays as it is otherwise; how it ended is told if MLflow was not reached for that.

    Raises:
        RunError: MLflow has not taken all of them.
    """
    spool = _spool(config)
    waiting = 0 if spool is None else len(spool)
    if spool is not None and (waiting or spool.end):
        tracker = _mlflow(config, None)
        tracker.send_waiting(config.model_dump(mode="json"))
        if len(spool) or spool.end:
            left = f"{len(spool)} of {waiting} records still wait"
            left = left if len(spool) else "how the run ended is still to be told"
            raise RunError(f"{left}: {tracker.problem or 'see the log'}")
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
    return sqlite_uri(folder / _DATABASE)


def sqlite_uri(file: Path) -> str:
    """The URI of a database file, whatever characters are in its path.

    SQLAlchemy begins options at `?` and decodes `%20`, so both are written as codes. MLflow makes
    the folders of what it reads behind `sqlite:///` itself, and does not decode it; the longer
    name of the same driver keeps it from that. SQLAlchemy before 2.1, which Python 3.10 has,
    decodes nothing.

    Raises:
        UserError: the path has a `?`, and SQLAlchemy is too old for that.
    """
    path = str(file)
    if not re.search("[%?]", path):
        return f"sqlite:///{path}"
    major, minor = metadata.version("sqlalchemy").split(".")[:2]
    if (int(major), int(minor)) < (2, 1):
        if "?" in path:
            raise UserError(
                f"{file}: SQLAlchemy before 2.1 cannot open a database with `?` in its path; name "
                "another folder by run.dir, or use Python 3.11 or newer"
            )
        return f"sqlite+pysqlite:///{path}"
    return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")
