"""`mhe sync`: metrics that waited on disk for MLflow."""

from __future__ import annotations

from launcher import console, runs
from launcher.verbs.results import RunName
from mhe_dist import tracking
from mhe_dist.config import Config


def sync(run: RunName) -> None:
    """Send the metrics of a run that did not reach MLflow, because it was down when the run ended.

    A run that goes on sends them by itself.

    Example: mhe sync quickstart
    """
    config = Config.model_validate(runs.settings(runs.find(run)))
    sent = tracking.sync(config)
    console.say(f"{sent:,} records sent." if sent else "Nothing waits: MLflow has everything.")
