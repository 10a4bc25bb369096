"""The protocol of a tracker, and trackers that keep nothing or combine others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

Status = Literal["finished", "failed", "killed"]


Metrics = Mapping[str, float]

HELDOUT: Final = "heldout/"
"""Before the names of held-out figures in the records."""

PICTURE: Final = re.compile(r"!\[(?P<what>[^\]]*)\]\((?P<path>[^):]+)\)")
"""A picture of a note that is one of the artifacts, in Markdown."""


class TrackedDataset(NamedTuple):
    """Images that a run reads, for the record.

    Attributes:
        name: of the set.
        context: what it is for: `training` or `evaluation`.
        digest: of its content.
        source: folder or URL.
        samples: images.
        classes: C.
    """

    name: str
    context: str
    digest: str
    source: str
    samples: int
    classes: int


@runtime_checkable
class Tracker(Protocol):
    """What keeps the record of a run."""

    @property
    def run_id(self) -> str | None:
        """What names the run, to go on with it after a restart; None where nothing does."""
        ...

    @property
    def page(self) -> str:
        """Where the server of the record shows the run, below its own address; or empty."""
        ...

    @property
    def problem(self) -> str:
        """Why values do not arrive and will not by themselves; empty while all is well."""
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
            path: the folder (`pipelines.serving.mlflow_model`).
            name: of the registered model, which gets a new version.
        """
        ...

    def dataset(self, dataset: TrackedDataset) -> None:
        """Say what images the run reads."""
        ...

    def note(self, text: str) -> None:
        """Put a text, in Markdown, at the head of the record; it replaces the one before.

        A picture in it, `![what](plots/a.png)`, is one of the artifacts.
        """
        ...

    def flush(self) -> None:
        """See what was recorded so far where `read_records` finds it, at a URL, too."""
        ...

    def close(self, status: Status = "finished") -> None:
        """Say how the run ended and see the record safely stored."""
        ...


class NullTracker:
    """Keeps nothing: for all ranks but the first, and for tests."""

    run_id: str | None = None
    page = ""
    problem = ""

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Keep nothing."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Keep nothing."""

    def artifact(self, path: str, folder: str = "") -> None:
        """Keep nothing."""

    def model(self, path: str, name: str) -> None:
        """Keep nothing."""

    def dataset(self, dataset: TrackedDataset) -> None:
        """Keep nothing."""

    def note(self, text: str) -> None:
        """Keep nothing."""

    def flush(self) -> None:
        """Keep nothing."""

    def close(self, status: Status = "finished") -> None:
        """Keep nothing."""


class CombinedTrackers:
    """Several trackers as one. All are closed, even when one of them fails to."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        """Args: trackers: called in this order."""
        self._trackers = list(trackers)

    @property
    def run_id(self) -> str | None:
        """The first run id that one of the trackers has."""
        ids = (tracker.run_id for tracker in self._trackers)
        return next((run_id for run_id in ids if run_id), None)

    @property
    def page(self) -> str:
        """The first page that one of the trackers has."""
        return next((tracker.page for tracker in self._trackers if tracker.page), "")

    @property
    def problem(self) -> str:
        """The problems of all of them."""
        return "; ".join(tracker.problem for tracker in self._trackers if tracker.problem)

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

    def dataset(self, dataset: TrackedDataset) -> None:
        """Hand the data set to each."""
        for tracker in self._trackers:
            tracker.dataset(dataset)

    def note(self, text: str) -> None:
        """Hand the text to each."""
        for tracker in self._trackers:
            tracker.note(text)

    def flush(self) -> None:
        """Let each store what it has."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self, status: Status = "finished") -> None:
        """Close each, in order; the first failure is raised when all have been asked."""
        with ExitStack() as stack:
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close, status)
