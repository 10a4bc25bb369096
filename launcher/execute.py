"""A whole run, in the terminal or in a job of a cluster: data, settings, training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from launcher.events import Event
from launcher.preflight.checks import check_selection
from launcher.ray_cluster.train import train_locally, train_on_cluster
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from pipelines.runs.folder import make_run_folder, read_run_config
from pipelines.runs.lock import refuse_locked


class Watcher(Protocol):
    """Who follows a run: shows it, or writes it down."""

    def waiting(self, what: str) -> None:
        """Something begins that gives no sign for a while."""

    def counting(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Work that is not a run; the function is called with what is done of how much."""

    def handle(self, event: Event) -> None:
        """An event of the run."""


def run(config: Config, watcher: Watcher, address: str = "", dashboard: bool = False) -> None:
    """Make the data set if it is to be made, keep the settings, train to the end.

    Args:
        config: of the run.
        watcher: follows the run.
        address: Ray cluster to train on; empty: one of this machine, for this run alone.
        dashboard: whether the Ray of this machine has its dashboard, whose link is told.

    Raises:
        UserError: the run's folder cannot be made, another process trains this run, or it has
            fewer groups than workers.
    """
    from pipelines.runs.auto_sizes import settle_sizes

    make_run_folder(config)
    refuse_locked(config.run.path, watcher.waiting)
    make_data(config, watcher)
    check_selection(config)
    config = settle_sizes(config)
    if read_run_config(config.run.path) is None:  # else rank 0 compares it first
        save_config(config, f"{config.run.path}/config.yaml")
    workers = config.scale.workers
    if address:
        watcher.waiting(f"waiting for {workers} workers")
        train_on_cluster(address, config, watcher.handle)
    else:
        watcher.waiting(f"starting Ray and {workers} workers: about 20 s")
        train_locally(config, watcher.handle, dashboard)


def make_data(config: Config, watcher: Watcher) -> None:
    """Make the data set of a config if it is missing and to be made."""
    if config.data.glyphs is None:
        return
    from mhe_dist.limits import available_cores
    from pipelines.sources.glyphs.build import ensure_glyphs
    from pipelines.storage.worker_pool import Processes

    with watcher.counting("drawing the data set") as progress:
        ensure_glyphs(config.data, progress, Processes(available_cores()))
