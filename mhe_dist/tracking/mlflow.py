"""MLflow as a tracker: a step never waits for it, and no outage loses a value.

`log` puts a record into a queue and on disk (`spool.py`); one thread sends what has gathered there,
in order. While the server cannot be reached, or takes nothing for want of a valid token, the thread
keeps trying; what has not arrived when the process ends, whatever ended it or why MLflow refused
it, is sent when the run goes on, or by `mhe sync`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from mhe_dist.errors import UserError
from mhe_dist.redact import flat, masked, scrub
from mhe_dist.tracking.base import Metrics, Status, TrackedDataset
from mhe_dist.tracking.mlflow_client import (
    NAME_LENGTH,
    ArtifactEntry,
    DatasetEntry,
    EndEntry,
    MlflowStore,
    ModelEntry,
    NoteEntry,
    is_permanent,
)
from mhe_dist.tracking.spool import MetricRecord, RunEnd, Spool
from mhe_dist.web_address import is_web_address

logger = logging.getLogger(__name__)

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The thread below tries again by itself; MLflow's own retries would hold up `close`.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_GATHER_S = 1.0  # records that arrive within this time are sent together
_FIRST_ATTEMPT_S = 60.0  # longest wait for a run id
_CLOSE_S = 30.0  # longest wait for what is still to be sent
_GRACE_S = 5.0  # for a call that had begun by then
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # between two attempts
MESSAGE_LENGTH = 300
_QUEUE_LIMIT = 100_000  # records


def quiet_mlflow() -> None:
    """Set what MLflow reads when it is imported: no telemetry, no bars; what is set stays."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


Entry = MetricRecord | ArtifactEntry | ModelEntry | DatasetEntry | NoteEntry | EndEntry


class MlflowTracker:
    """One MLflow run; after a restart the same one goes on."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        artifacts: str = "",
        spool: Spool | None = None,
    ) -> None:
        """Args:
            uri: of the server or database, with its credentials if it needs any.
            experiment: name; made when it is missing.
            run_name: what people call the run.
            run_id: the run to go on with; None: a new one.
            artifacts: local folder for the artifacts of a new experiment in a local database.
            spool: where records wait on disk; its run id goes before `run_id`.

        Raises:
            UserError: MLflow has no store for that URI.
        """
        scheme = uri.partition(":")[0].partition("+")[0]
        is_web = scheme in ("http", "https")
        if scheme not in _SCHEMES or (is_web and not is_web_address(uri)):
            raise UserError(
                f"tracking.uri={scrub(uri)!r} is no MLflow tracking URI: give http(s)://host:port "
                "of a server, sqlite:///file.db or another database; or set tracking.mlflow=false"
            )
        quiet_mlflow()
        self._spool = spool
        run_id = (None if spool is None else spool.run_id) or run_id
        self._store = MlflowStore(
            uri,
            experiment,
            run_name,
            run_id,
            artifacts if scheme == "sqlite" else "",
            uuid.uuid4().hex if spool is None else spool.request,
        )
        self._queue: queue.Queue[Entry] = queue.Queue(_QUEUE_LIMIT)
        self._attempted = threading.Event()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._patient = False
        self._lost = 0
        self._down = False
        self._cut_short = False  # whether some metrics have not arrived
        self._problem, self._last_error = "", ""
        self._thread = threading.Thread(target=self._run_thread, name="mlflow-tracker", daemon=True)

    @property
    def run_id(self) -> str | None:
        """MLflow's run id; waits for the first attempt to open the run, None when that failed."""
        if self._thread.is_alive():
            self._attempted.wait(_FIRST_ATTEMPT_S)
        return self._store.run_id

    @property
    def page(self) -> str:
        """The run in the view for training; MLflow's pages begin in that for language models."""
        run, experiment = self.run_id, self._store.experiment_id
        if run is None or experiment is None:
            return ""
        return f"#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"

    @property
    def problem(self) -> str:
        """What MLflow refused first, or what was still to be sent when the tracker was closed."""
        return self._problem

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Begin to open the run. MLflow is imported here, on the caller's thread: about 2 s."""
        if self._spool is not None:
            self._spool.end = None
        self._start(config, tags, step)

    def send_waiting(self, config: Mapping[str, Any]) -> None:
        """Send what waits on disk, and nothing else: a run that MLflow knows stays as it is.

        How it ended is told if that waits, too. This takes as long as MLflow takes something in
        each half minute.

        Args:
            config: of the run, for one that MLflow does not know yet.
        """
        end = None if self._spool is None else self._spool.end
        self._store.as_found = True
        self._patient = True
        self._start(config, {}, sys.maxsize)
        self._close(EndEntry(end.status, end.time_ms) if end else EndEntry(None))

    def _start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int) -> None:
        import mlflow  # noqa: F401

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # logs every retry twice

        params = {key: str(value) for key, value in flat(masked(config)).items()}
        self._store.describe(params, {key: scrub(str(value)) for key, value in tags.items()})
        waiting = [] if self._spool is None else self._spool.pending(step)
        self._queue.maxsize = _QUEUE_LIMIT + len(waiting)  # they are in memory already
        for record in waiting:
            self._put(record)
        self._store.step = step
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue the values; their names lose the characters that MLflow refuses."""
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        record = MetricRecord(step, int(time.time() * 1000), named)
        if self._spool is None:
            self._put(record)
            return
        with self._spool.lock:
            self._spool.add(record)
            self._put(record)

    def artifact(self, path: str, folder: str = "") -> None:
        """Queue the file or folder; it must not change afterwards."""
        self._put(ArtifactEntry(path, folder))

    def model(self, path: str, name: str) -> None:
        """Queue the folder of a model and its registration."""
        self._put(ModelEntry(path, name))

    def dataset(self, dataset: TrackedDataset) -> None:
        """Queue the data set, which MLflow shows among the run's inputs."""
        self._put(DatasetEntry(dataset._replace(source=scrub(dataset.source))))

    def note(self, text: str) -> None:
        """Queue the text; MLflow shows it as the run's description."""
        self._put(NoteEntry(scrub(text)))

    def flush(self) -> None:
        """Nothing: the thread sends by itself."""

    def close(self, status: Status = "finished") -> None:
        """Send what is queued and mark the run; wait for that half a minute at most."""
        if not self._thread.is_alive() or self._closing.is_set():
            return
        end = RunEnd(status, int(time.time() * 1000))
        if self._spool is not None:
            self._spool.end = end  # until MLflow has it
        self._close(EndEntry(*end))

    def _close(self, end: EndEntry) -> None:
        self._deadline = time.monotonic() + _CLOSE_S
        self._closing.set()
        self._put(end)
        while self._thread.is_alive() and time.monotonic() < self._deadline + _GRACE_S:
            self._thread.join(self._deadline + _GRACE_S - time.monotonic())
        if self._lost or self._thread.is_alive():
            count = "some" if self._thread.is_alive() else self._lost
            problem = (
                f"{count} values did not reach MLflow at {scrub(self._store.uri)}"
                f"{f' ({self._last_error})' if self._last_error else ''}; metrics.jsonl has them"
                f"{self._how_to_send()}"
            )
            logger.warning("%s", problem)
            self._problem = self._problem or problem

    def _how_to_send(self) -> str:
        """The command that sends what is kept on disk; empty where nothing is."""
        if self._spool is None or not (len(self._spool) or self._spool.end):
            return ""
        command = shlex.join(["mhe", "sync", str(self._spool.folder.parent)])
        return f", and `{command}` {'asks again' if self._problem else 'sends them later'}"

    def _put(self, entry: Entry) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._lost += 1
            self._cut_short = True

    def _run_thread(self) -> None:
        """The thread: open the run, then send what comes until the end of the record."""
        opened = self._retry(self._store.open)
        self._cut_short |= not opened
        if self._spool is not None and self._store.run_id:
            self._spool.run_id = self._store.run_id
        self._attempted.set()
        while True:
            entries = self._next_entries()
            for kind, group in groupby(entries, type):
                for send, count in self._store.calls(list(group)):
                    if opened and self._retry(send, optional=kind is not MetricRecord):
                        self._arrived(kind)
                    else:
                        self._lost += count
                        self._cut_short |= kind is MetricRecord
            self._clear_spool()
            if any(isinstance(entry, EndEntry) for entry in entries):
                return

    def _arrived(self, kind: type[Entry]) -> None:
        if self._spool is not None and kind is EndEntry:
            self._spool.end = None

    def _clear_spool(self) -> None:
        """Empty the spool if all metrics that were queued have arrived."""
        if self._spool is None or self._cut_short:
            return
        with self._spool.lock:
            if self._queue.empty():
                self._spool.clear()

    def _next_entries(self) -> list[Entry]:
        """The next entry, and those that arrive within a second after it."""
        entries = [self._queue.get()]
        self._closing.wait(_GATHER_S)
        while len(entries) < _QUEUE_LIMIT:
            try:
                entries.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return entries

    def _retry(self, send: Callable[[], None], optional: bool = False) -> bool:
        """Call `send` until it succeeds; False when it never will, or when time is up.

        Args:
            send: what to call.
            optional: see `is_permanent`.
        """
        pause = _PAUSE_S
        while True:
            try:
                send()
                self._down = False
                if self._patient:
                    self._deadline = time.monotonic() + _CLOSE_S
                return True
            except Exception as error:  # a thread's last defence: nothing here may end the run
                message = self._last_error = scrub(str(error))[:MESSAGE_LENGTH]
                if is_permanent(error, optional):
                    logger.warning("MLflow refuses: %s", message)
                    self._problem = self._problem or (
                        f"MLflow at {scrub(self._store.uri)} refuses values, and is not asked "
                        f"again: {message}; metrics.jsonl has them"
                    )
                    return False
                if not self._down:
                    logger.warning("MLflow fails, will go on trying: %s", message)
            self._down = True
            self._attempted.set()
            if time.monotonic() + pause > self._deadline:
                return False
            pause = self._pause(pause)

    def _pause(self, pause: float) -> float:
        """Wait that long, or until the run is being closed; the length of the next pause."""
        if self._closing.is_set():
            time.sleep(pause)
            return pause
        return _PAUSE_S if self._closing.wait(pause) else min(2 * pause, _LONGEST_PAUSE_S)


def metric_name(name: str) -> str:
    """`name` as MLflow takes it: `tar@far=1e-3` becomes `tar_at_far_1e-3`."""
    return re.sub(r"[^\w .:/-]", "_", name.replace("@", "_at_"))[:NAME_LENGTH]
