"""The machine that trains, beside the curves of what it trains."""

from __future__ import annotations

import logging
from typing import Any

from mhe_dist.redact import scrub

logger = logging.getLogger(__name__)

INTERVAL_S = 30.0  # between two looks at the machine


def watch_system(uri: str, run_id: str | None) -> Any:
    """Log CPU, GPU, memory, disk and network of this machine as MLflow's `system/` metrics.

    Returns:
        MLflow's monitor, a thread of its own; None where it cannot be made.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # says what it cannot see
    try:
        monitor = SystemMetricsMonitor(
            run_id, sampling_interval=INTERVAL_S, resume_logging=True, tracking_uri=uri
        )
        monitor.start()
    except Exception as error:  # a graph of the machine may lack; the run's record may not
        logger.warning("no system metrics: %s", scrub(str(error)))
        return None
    return monitor
