"""Keeps what an evaluation found: JSON and a picture beside the run, and the same in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from mhe_dist.tracking.append import append
from mhe_dist.tracking.base import Metrics
from pipelines.report import figures as pictures
from pipelines.report.plots import STYLE
from pipelines.storage.urls import atomic_write, resolve_url

FOLDER = "evaluation"

Curves = Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""Name -> FAR and TAR, both `[n]`."""


def write(run: str, name: str, results: Any, curves: Curves, title: str) -> list[str]:
    """Write `<run>/evaluation/<name>.json` and, if there are curves, `<name>.png`.

    Args:
        run: folder or URL of the run.
        name: of the evaluation; what an earlier one of that name left is replaced.
        results: what JSON can hold.
        curves: ROC curves.
        title: of the picture.

    Returns:
        Paths of the files.
    """
    place = f"{run}/{FOLDER}/{name}"
    with atomic_write(f"{place}.json") as stream:
        stream.write(json.dumps(results, indent=2).encode())
    if not curves:
        return [f"{place}.json"]
    pictures.save(roc_figure(curves, title), f"{place}.png")
    return [f"{place}.json", f"{place}.png"]


def to_mlflow(uri: str, run_id: str, step: int, metrics: Metrics, files: list[str]) -> None:
    """Add the figures and the files, wherever they lie, to the run in MLflow.

    Raises:
        RunError: MLflow cannot be reached, or refuses.
    """
    with TemporaryDirectory() as folder:
        local = []
        for url in files:
            filesystem, path = resolve_url(url)
            local.append(f"{folder}/{PurePosixPath(path).name}")
            filesystem.get_file(path, local[-1])
        append(uri, run_id, step, metrics, local, FOLDER)


def roc_figure(curves: Curves, title: str) -> Figure:
    """TAR over FAR, a line for each name."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for name, (far, tar) in curves.items():
            axes.plot(far, tar, label=name, clip_on=False)
        axes.set_xscale("log")
        axes.set(title=title, xlabel="false accept rate", ylabel="true accept rate")
        lowest = min(float(tar.min()) for _, tar in curves.values())
        axes.set_ylim(max(0.0, lowest - 0.02), 1.002)
        axes.legend(loc="lower right")
        return figure
