"""Runs on Ray from Python: what `mhe train` and `mhe submit` do, for a script or a notebook."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from launcher import execute
from launcher.preflight.checks import check_data, check_names
from launcher.preflight.survey import assess, survey_cluster
from launcher.ray_cluster.code_package import with_absolute_paths
from launcher.ray_cluster.jobs import Cluster, Job, resolve_variables
from launcher.signals import Interrupted, interruptible
from launcher.terminal.progress import ProgressDisplay
from mhe_dist.config.load import ConfigLike, resolve_config
from mhe_dist.errors import Preempted
from pipelines.runs.folder import read_summary
from pipelines.runs.resume import refuse_changed_config


def train(
    config: ConfigLike,
    overrides: Sequence[str] = (),
    *,
    address: str = "",
    progress: bool = True,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, evaluate and export a run on Ray; go on where its newest checkpoint ends.

    A run that is complete is left alone. Runs in one process follow one another: each starts a Ray
    cluster of its own on this machine and ends it, unless `address` names one.

    Args:
        config: a YAML file, a dict of sections, or a `Config`.
        overrides: `section.key=value` each, as on the command line.
        address: of an existing Ray cluster, such as "auto"; empty: one of this machine.
        progress: draw a bar in a terminal or a notebook with ipywidgets, print lines elsewhere.
        **sections: keys of some sections, such as `train={"max_steps": 100}`.

    Returns:
        The summary of the run, also in its `summary.json`.

    Raises:
        UserError: the config is wrong, the run was begun with other settings or another process
            trains it, this machine lacks what it needs, or this process uses Ray already.
        RunError: the run failed more often than `scale.max_failures`.
        Preempted: SIGTERM came; the run is saved and goes on when called again.
        KeyboardInterrupt: Ctrl-C, or the notebook's button; without a save.
    """
    found = resolve_config(config, overrides, [check_data, check_names], **sections)
    changes = refuse_changed_config(found)
    if not changes and (done := read_summary(found.run.path)) is not None:
        return done
    display = ProgressDisplay(None if progress else Console(quiet=True))
    try:
        with interruptible(), display:
            execute.run(found, display, address)
    except Interrupted as stop:
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt from stop
        if stop.run_exit_code == Preempted.exit_code:
            raise Preempted("told to stop before the run began; nothing is lost") from stop
        raise
    return display.summary or {}


def submit(
    config: ConfigLike,
    overrides: Sequence[str] = (),
    *,
    address: str = "",
    preflight: bool = True,
    variables: Mapping[str, str] | None = None,
    **sections: Mapping[str, Any],
) -> Job:
    """Submit a run as a job of a Ray cluster and return at once; `Cluster` follows and stops it.

    Args:
        config: see `train`; local paths mean a file system that all nodes mount.
        overrides: `section.key=value` each, as on the command line.
        address: dashboard of the cluster; empty: RAY_API_SERVER_ADDRESS, or that of this machine.
        preflight: first ask all nodes whether the run can work there.
        variables: further environment variables for the workers; never a secret, because a
            cluster shows the variables of its jobs.
        **sections: keys of some sections, such as `train={"max_steps": 100}`.

    Raises:
        UserError: the config is wrong, a variable looks like a secret, no cluster answers, a job is
            training this run, or the preflight found what stands in its way.
    """
    found = with_absolute_paths(resolve_config(config, overrides, [check_names], **sections))
    passed = resolve_variables([f"{name}={value}" for name, value in (variables or {}).items()])
    cluster = Cluster(address)
    cluster.refuse_running(found)
    if preflight:
        assess(found, survey_cluster(found, cluster, trial=False), trial=False)
    return cluster.find(cluster.start(found, passed))
