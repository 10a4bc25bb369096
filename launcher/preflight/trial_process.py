"""A trial of a few steps on this machine, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.ray_cluster.code_package import SETTINGS_FILE, with_absolute_paths
from launcher.ray_cluster.environment import worker_environment
from launcher.terminal.event_log import parse_error
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.errors import RunError, UserError

TRIAL_S = 240.0


def measure_trial(config: Config, workers: int, of_workers: int) -> dict[str, Any] | None:
    """What a trial of some workers measures here; None while the data set is still to be made.

    Args:
        config: of the run.
        workers: that take part.
        of_workers: that the run would have.

    Raises:
        UserError: the run could not work, for a reason that the trial names.
        RunError: the trial failed; the message holds its last words.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-") as folder:
        file = Path(folder) / SETTINGS_FILE
        file.write_text(config_to_yaml(with_absolute_paths(config)), encoding="utf-8")
        done = _run(
            [
                sys.executable,
                "-m",
                "launcher.job",
                "trial",
                str(file),
                str(workers),
                str(of_workers),
            ],
            {**os.environ, **worker_environment(config)},
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 2:  # a mistake
        raise UserError(parse_error(done.stderr))
    if done.returncode or not lines:
        raise RunError("the trial failed: " + "\n".join(done.stderr.strip().splitlines()[-3:]))
    measured: dict[str, Any] | None = json.loads(lines[-1])
    return measured


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a trial; whatever ends the wait for it ends all of its processes.

    Raises:
        RunError: it did not end within `TRIAL_S`.
    """
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its workers are processes of their own, and must not outlive it
    )
    try:
        out, err = process.communicate(timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"the trial of a few steps did not end within {TRIAL_S:.0f} s, so there is no "
            "prediction: the machine is busy, or the network large for it; try again when it is "
            "quiet, or with --no-trial, which asks for the rest alone; mhe train needs no trial"
        ) from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
