"""The calls to MLflow that open one run, fill it and end it; nothing here waits or retries.

Whoever calls may do so again after a failure, also where only the answer was lost: what is made
once (a run, a version of a model) carries a tag by which it is found before it is made again.
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mhe_dist.redact import scrub
from mhe_dist.tracking.base import PICTURE, Status, TrackedDataset
from mhe_dist.tracking.spool import MetricRecord

logger = logging.getLogger(__name__)

METRICS_PER_CALL, _ENTRIES_PER_CALL = 1000, 100  # limits of MLflow's log-batch
_PARAM_LENGTH, _TAG_LENGTH, NAME_LENGTH = 6000, 5000, 250
_DIGEST_LENGTH = 36  # of MLflow's data sets; the whole one is in the profile
_NOTE = "mlflow.note.content"
_REQUEST = "mhe.request"  # tag: which of our requests made this
_CONSTANTS = frozenset({"chance", "gallery", "probes", "pairs", "impostors"})
_COLUMNS = [  # of a sample
    {"type": "binary", "name": "image", "required": True},
    {"type": "long", "name": "class", "required": True},
]


@dataclass(frozen=True)
class ArtifactEntry:
    """A file or folder to copy."""

    path: str
    folder: str


@dataclass(frozen=True)
class ModelEntry:
    """A model's folder to copy and to register."""

    path: str
    name: str
    request: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that the run reads."""

    dataset: TrackedDataset


@dataclass(frozen=True)
class NoteEntry:
    """The description of the run, in Markdown."""

    text: str


@dataclass(frozen=True)
class EndEntry:
    """The last entry of the queue.

    Attributes:
        status: how the run ended; None: MLflow's own word on that stays.
        time_ms: when it ended.
    """

    status: Status | None
    time_ms: int | None = None


def is_constant(name: str) -> bool:
    """Whether a metric is the size of a set or the rate of chance, the same at every step."""
    return name.rpartition("/")[2] in _CONSTANTS


class MlflowStore:
    """The calls to MLflow; used by the tracker's thread alone once the run is being opened."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None,
        artifacts: str,
        request: str,
    ):
        self.uri = uri
        self.run_id = run_id
        self.experiment_id: str | None = None  # known once the run was opened
        self._experiment = experiment
        self._run_name = run_name
        self._artifacts = artifacts
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._client: Any = None
        self.step = 0  # first one that this process records
        self.as_found = False  # whether a run that exists stays as it is, but for its values
        self._request, self._child_request = request, uuid.uuid4().hex
        self._is_ours = False  # whether this process made the run
        self._child_id: str | None = None  # of the child run of a process that goes on
        self._system: Any = None

    def describe(self, params: dict[str, str], tags: dict[str, str]) -> None:
        """Remember what `open` will log; commit and user also where MLflow's pages show them."""
        self._params = params
        self._tags = {"mlflow.source.name": "mhe", "mlflow.source.type": "LOCAL"} | tags
        with suppress(KeyError, ImportError, OSError):  # a machine need not have such an account
            self._tags["mlflow.user"] = getpass.getuser()
        if "git_commit" in tags:
            self._tags["mlflow.source.git.commit"] = tags["git_commit"].partition("-")[0]

    def open(self) -> None:
        """Find or make the experiment and the run, mark it as running, log params and tags.

        Of a run that stays as it was found, only one that is made here gets params and tags.
        """
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self.uri)
        logged = self._params_of_resumed()
        if logged is None:
            self.experiment_id = self._find_experiment()
            self.run_id = self._create_once(self._request, self._run_name, {})
            # Some, if it was made by a process that was killed before it kept the id.
            logged = dict(self._client.get_run(self.run_id).data.params)
            self._is_ours = True
        elif self.as_found and not self._is_ours:
            return
        elif not self._is_ours:
            self._client.update_run(self.run_id, status="RUNNING")
            self._child_id = self._create_child()
        changed = {
            k: v for k, v in self._params.items() if k in logged and logged[k] != v[:_PARAM_LENGTH]
        }
        self._log_params({k: v for k, v in self._params.items() if k not in logged})
        self._log_tags(self._tags | {f"changed.{key}": value for key, value in changed.items()})
        if not self.as_found:
            self._system = start_system_metrics(self.uri, self.run_id)

    def calls(self, entries: list[Any]) -> list[tuple[Callable[[], None], int]]:
        """What to call for these entries, in order, and how many entries each call carries."""
        calls: list[tuple[Callable[[], None], int]] = []
        records: list[MetricRecord] = []
        for entry in entries:
            if isinstance(entry, MetricRecord):
                records.append(entry)
                continue
            calls += self._metric_calls(records)
            records = []
            if isinstance(entry, ArtifactEntry):
                calls.append((partial(self._log_artifact, entry), 1))
            elif isinstance(entry, ModelEntry):
                calls.append((partial(self._log_model, entry), 1))
            elif isinstance(entry, DatasetEntry):
                calls.append((partial(self._log_input, entry.dataset), 1))
            elif isinstance(entry, NoteEntry):
                calls.append((partial(self._log_note, entry.text), 1))
            else:
                calls.append((partial(self._end, entry), 1))
        return calls + self._metric_calls(records)

    def _metric_calls(self, records: list[MetricRecord]) -> list[tuple[Callable[[], None], int]]:
        from mlflow.entities import Metric

        metrics = []
        constants: dict[str, str] = {}
        for record in records:
            for name, value in record.metrics.items():
                if is_constant(name):
                    constants[name] = f"{value:.15g}"
                else:
                    metrics.append(Metric(name, value, record.time_ms, record.step))
        starts = range(0, len(metrics), METRICS_PER_CALL)
        pieces = [metrics[start : start + METRICS_PER_CALL] for start in starts]
        calls: list[tuple[Callable[[], None], int]] = [
            (partial(self._log_metrics, piece), len(piece)) for piece in pieces
        ]
        if constants:
            calls.append((partial(self._log_constants, constants), len(constants)))
        return calls

    def _log_constants(self, constants: dict[str, str]) -> None:
        """Log as params what stays the same; a param cannot change, so another value is a tag."""
        known = self._client.get_run(self.run_id).data.params
        self._log_params({name: value for name, value in constants.items() if name not in known})
        changed = {k: v for k, v in constants.items() if known.get(k, v) != v}
        self._log_tags({f"changed.{name}": value for name, value in changed.items()})

    def _log_input(self, dataset: TrackedDataset) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        protocol = dataset.source.partition("://")[0] if "://" in dataset.source else "local"
        profile = {
            "num_rows": dataset.samples,
            "num_classes": dataset.classes,
            "digest": dataset.digest,
        }
        described = Dataset(
            name=dataset.name,
            digest=dataset.digest.partition(":")[2][:_DIGEST_LENGTH] or dataset.digest,
            source_type=protocol,
            source=json.dumps({"uri": dataset.source}),
            schema=json.dumps({"mlflow_colspec": _COLUMNS}),
            profile=json.dumps(profile),
        )
        context = InputTag("mlflow.data.context", dataset.context)
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(described, [context])])

    def _log_metrics(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        existing = self._client.get_experiment_by_name(self._experiment)
        if existing is not None:
            return existing.experiment_id
        location = Path(self._artifacts).absolute().as_uri() if self._artifacts else None
        try:
            return self._client.create_experiment(self._experiment, artifact_location=location)
        except MlflowException:
            # Another run may have made it meanwhile.
            existing = self._client.get_experiment_by_name(self._experiment)
            if existing is None:
                raise
            return existing.experiment_id

    def _params_of_resumed(self) -> dict[str, str] | None:
        """Params of the run to go on with; None: there is no such run (any more)."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                self.experiment_id = run.info.experiment_id
                return dict(run.data.params)
        logger.warning("MLflow has no run %s: a new one begins", self.run_id)
        self.run_id = None
        return None

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(k[:NAME_LENGTH], v[:_PARAM_LENGTH]) for k, v in params.items()]
        for i in range(0, len(entries), _ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, params=entries[i : i + _ENTRIES_PER_CALL])

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(k[:NAME_LENGTH], v[:_TAG_LENGTH]) for k, v in tags.items()]
        for i in range(0, len(entries), _ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, tags=entries[i : i + _ENTRIES_PER_CALL])

    def _log_note(self, text: str) -> None:
        """Its pictures get the address under which MLflow's pages show an artifact."""

        def picture(found: re.Match[str]) -> str:
            query = urlencode({"path": found["path"], "run_uuid": self.run_id})
            return f"![{found['what']}](get-artifact?{query})"

        self._log_tags({_NOTE: PICTURE.sub(picture, text)})

    def _log_artifact(self, artifact: ArtifactEntry) -> None:
        # A folder goes there under its own name.
        self._client.log_artifact(self.run_id, artifact.path, artifact.folder or None)

    def _log_model(self, model: ModelEntry) -> None:
        """Copy the folder to `model` of the run, and make it the next version of its name."""
        from mlflow.exceptions import MlflowException

        self._client.log_artifacts(self.run_id, model.path, "model")
        try:
            self._client.create_registered_model(model.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        query = _of_request(model.request)
        if not self._client.search_model_versions(query):
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/model"
            tags = {_REQUEST: model.request}
            self._client.create_model_version(model.name, source, self.run_id, tags)
        made = self._client.search_model_versions(query, order_by=["version_number ASC"])
        for twin in made[1:]:  # see `_create_once`
            self._client.delete_model_version(twin.name, twin.version)

    def _create_child(self) -> str:
        """A run below this one, for what this process does of it."""
        tags = {"mlflow.parentRunId": self.run_id, "step": str(self.step), **self._tags}
        name = f"{self._run_name} from step {self.step}"
        return self._create_once(self._child_request, name, tags)

    def _create_once(self, request: str, name: str, tags: dict[str, Any]) -> str:
        """The id of the run of a request, which is made unless an attempt before has made it."""
        made = self._made_by(request)
        if not made:
            run = self._client.create_run(
                self.experiment_id, run_name=name, tags={_REQUEST: request, **tags}
            )
            made = [str(run.info.run_id)]
        # MLflow's own client sends a request again whose answer did not come: two are made, then.
        for twin in set(self._made_by(request)) - {made[0]}:
            self._client.delete_run(twin)
        return made[0]

    def _made_by(self, request: str) -> list[str]:
        """Ids of the runs that a request has made."""
        found = self._client.search_runs([self.experiment_id], _of_request(request))
        return [str(run.info.run_id) for run in found]

    def _end(self, entry: EndEntry) -> None:
        if self._system:
            self._system.finish()
        if entry.status is None and not self._is_ours:
            return
        # A run that is made here for what waited of it was ended by what let nobody say so.
        status = entry.status or "killed"
        for run_id in filter(None, (self._child_id, self.run_id)):
            self._client.set_terminated(run_id, status.upper(), entry.time_ms)


def _of_request(request: str) -> str:
    """The filter of MLflow's searches for what a request has made."""
    return f"tags.`{_REQUEST}` = '{request}'"


_UNTIL_RENEWED = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")  # 401: an expired token
_UNTIL_MENDED = ("PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "NOT_FOUND")
"""403 and 404, often by a proxy before the server. A run that is not there has another code."""


def is_permanent(error: Exception, optional: bool = False) -> bool:
    """Whether trying again cannot help: the request is wrong, not the connection.

    Args:
        error: what the call raised.
        optional: whether the values of the run are sent without this, too: where a server forbids
            it or does not know it, waiting for that would hold them up.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        if "database schema" in str(error):  # of another version, and an "internal error"
            return True
        if error.error_code in _UNTIL_RENEWED:
            return False
        if error.error_code in _UNTIL_MENDED:
            return optional
        status = error.get_http_status_code()
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return True
    import sqlalchemy.exc

    return not isinstance(error, OSError | sqlalchemy.exc.OperationalError)


INTERVAL_S = 30.0  # between two samples of the machine


def start_system_metrics(uri: str, run_id: str | None) -> Any:
    """Log CPU, GPU, memory, disk and network of this machine as MLflow's `system/` metrics.

    Returns:
        MLflow's monitor, a thread of its own; None where it cannot be made.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # It warns of each device that it cannot read.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    try:
        monitor = SystemMetricsMonitor(
            run_id, sampling_interval=INTERVAL_S, resume_logging=True, tracking_uri=uri
        )
        monitor.start()
    except Exception as error:  # the machine's graphs may be missing; the run's record may not
        logger.warning("no system metrics: %s", scrub(str(error)))
        return None
    return monitor
