"""Adds results to a run that MLflow knows already, long after its training."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mhe_dist.errors import RunError
from mhe_dist.redact import scrub
from mhe_dist.tracking.base import Metrics
from mhe_dist.tracking.mlflow import MESSAGE_LENGTH, metric_name, quiet_mlflow
from mhe_dist.tracking.mlflow_client import METRICS_PER_CALL


def append_to_mlflow_run(
    uri: str, run_id: str, step: int, metrics: Metrics, files: Sequence[str], folder: str
) -> None:
    """Add to a run that exists, whatever its status, and leave that as it is.

    Args:
        uri: of the server or database.
        run_id: of the run.
        step: that the values belong to.
        metrics: name -> value.
        files: local files to copy into `folder` of the artifacts.
        folder: see `files`.

    Raises:
        RunError: MLflow cannot be reached, or refuses.
    """
    quiet_mlflow()
    import sqlalchemy.exc
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    now = int(time.time() * 1000)
    entries = [Metric(metric_name(n), float(v), now, step) for n, v in metrics.items()]
    try:
        client = MlflowClient(uri)
        for i in range(0, len(entries), METRICS_PER_CALL):
            client.log_batch(run_id, metrics=entries[i : i + METRICS_PER_CALL])
        for file in files:
            client.log_artifact(run_id, file, folder)
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        message = scrub(str(error))[:MESSAGE_LENGTH]
        raise RunError(f"MLflow at {scrub(uri)} did not take the results: {message}") from error
