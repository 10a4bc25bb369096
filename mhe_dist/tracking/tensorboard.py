"""Event files for TensorBoard in the run's folder, for those who watch their runs there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mhe_dist.errors import UserError
from mhe_dist.redact import flat, masked, scrub
from mhe_dist.tracking.base import PICTURE, Metrics, Status, TrackedDataset

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
_FLUSH_S = 30  # what a killed process may lose here; metrics.jsonl loses nothing


class TensorBoardTracker:
    """Scalars of every step, the config and the closing note, as TensorBoard shows them.

    A thread of the library writes; `log` does not wait for it. If the disk refuses events, the
    run goes on without them: `metrics.jsonl` is the record.
    """

    run_id: str | None = None
    page = ""

    def __init__(self, folder: str) -> None:
        """Args: folder: for the event files; it is made when it is missing.

        Raises:
            UserError: the folder is a URL, or the library is not installed.
        """
        if "://" in folder:
            raise UserError(
                f"tracking.tensorboard=true writes into the run's folder, and {folder} is a URL: "
                "let run.dir be a folder, or set tracking.tensorboard=false"
            )
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"tracking.tensorboard=true needs the library tensorboard ({error}): "
                "pip install 'mhe[tensorboard]', or set tracking.tensorboard=false"
            ) from error
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self.problem = ""

    def start(self, config: Mapping[str, Any], tags: Mapping[str, str], step: int = 0) -> None:
        """Open a file of events that supersede those of steps >= `step`."""
        from torch.utils.tensorboard import SummaryWriter

        # Also from step 0: a run may begin again, and TensorBoard's server ignores the first purge.
        self._writer = SummaryWriter(self._folder, purge_step=step, flush_secs=_FLUSH_S)
        rows = {**flat(masked(config)), **{key: scrub(str(value)) for key, value in tags.items()}}
        table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
        self._write(lambda writer: writer.add_text("config", f"| key | value |\n|-|-|\n{table}"))

    def log(self, step: int, metrics: Metrics) -> None:
        """Hand the values to the library's thread."""

        def write(writer: SummaryWriter) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self._write(write)

    def artifact(self, path: str, folder: str = "") -> None:
        """Nothing: the run's folder holds its files already."""

    def model(self, path: str, name: str) -> None:
        """Nothing: the run's folder holds it already."""

    def dataset(self, dataset: TrackedDataset) -> None:
        """Say what images the run reads, as a text."""
        text = f"{dataset.samples:,} images of {dataset.classes:,} classes, {dataset.digest}"
        self._write(lambda writer: writer.add_text(f"data/{dataset.context}", text))

    def note(self, text: str) -> None:
        """The run's main figures, as a text; TensorBoard shows no file of the run."""
        self._write(lambda writer: writer.add_text("note", scrub(PICTURE.sub("", text)).strip()))

    def flush(self) -> None:
        """Nothing: the library's thread writes by itself."""

    def close(self, status: Status = "finished") -> None:
        """Write what waits."""
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:  # the thread's, told to the next caller
            self.problem = f"{self._folder}: no events for TensorBoard any more: {error}"
            logger.error("%s", self.problem)
            self._writer = None
