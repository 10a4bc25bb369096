"""Saves the results of an evaluation: JSON and a ROC beside the run, and both in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from mhe_dist.tracking.append import append_to_mlflow_run
from mhe_dist.tracking.base import Metrics
from pipelines.report.charts.run_charts import Curves
from pipelines.report.figures import cut_note, save_figure
from pipelines.report.plots import STYLE
from pipelines.storage.urls import atomic_write, local_copies

EVALUATION_FOLDER = "evaluation"


def save_evaluation(
    run: str, name: str, results: dict[str, Any], curves: Curves, title: str
) -> list[str]:
    """Write `<run>/evaluation/<name>.json` and, if there are curves, `<name>.png`.

    The JSON holds the curves, too, as `curves`: name -> `far`, `tar`.

    Args:
        run: folder or URL of the run.
        name: of the evaluation; the files of an earlier one of that name are replaced.
        results: what JSON can hold.
        curves: ROC curves.
        title: of the plot.

    Returns:
        Paths of the files.
    """
    if curves:
        points = {key: {"far": far, "tar": tar} for key, (far, tar) in curves.items()}
        results = results | {"curves": points}
    stem = f"{run}/{EVALUATION_FOLDER}/{name}"
    with atomic_write(f"{stem}.json") as stream:
        stream.write(json.dumps(results, indent=2, default=_rounded).encode())
    if not curves:
        return [f"{stem}.json"]
    save_figure(draw_roc(curves, title), f"{stem}.png")
    return [f"{stem}.json", f"{stem}.png"]


def save_details(run: str, name: str, details: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write what pictures of an evaluation show to `<run>/evaluation/<name>.npz`."""
    with atomic_write(f"{run}/{EVALUATION_FOLDER}/{name}.npz") as stream:
        np.savez_compressed(stream, **details)  # type: ignore[arg-type]


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    """Points of a curve, with as many digits as a picture can show."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def log_evaluation(uri: str, run_id: str, step: int, metrics: Metrics, files: list[str]) -> None:
    """Add metrics, and files at any path or URL, to the run in MLflow.

    Raises:
        RunError: MLflow cannot be reached, or refuses.
    """
    with local_copies() as copied:
        local = [copied(file) for file in files]
        append_to_mlflow_run(uri, run_id, step, metrics, local, EVALUATION_FOLDER)


def draw_roc(curves: Curves, title: str) -> Figure:
    """Draw TAR over FAR, a line for each name."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for name, (far, tar) in curves.items():
            axes.plot(far, tar, label=name, clip_on=False)
        axes.set_xscale("log")
        lowest = max(0.0, min(float(tar.min()) for _, tar in curves.values()) - 0.02)
        axes.set(title=title, xlabel="false accept rate")
        axes.set_ylabel(f"true accept rate{cut_note(lowest)}")
        axes.set_ylim(lowest, 1.002)
        axes.legend(loc="lower right")
        return figure
