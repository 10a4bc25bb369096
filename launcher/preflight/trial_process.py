"""A trial of a few steps on this machine, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher.ray_cluster.code_package import SETTINGS_FILE, with_absolute_paths
from launcher.ray_cluster.environment import worker_environment
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.errors import RunError, UserError

TRIAL_S = 120.0


def measure_trial(config: Config, workers: int) -> dict[str, Any] | None:
    """What a trial of some workers measures here; None while the data set is still to be made.

    Raises:
        UserError: the run could not work, for a reason that the trial names.
        RunError: the trial failed; the message holds its last words.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-") as folder:
        file = Path(folder) / SETTINGS_FILE
        file.write_text(config_to_yaml(with_absolute_paths(config)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "launcher.job", "trial", str(file), str(workers)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **worker_environment(config)},
            capture_output=True,
            text=True,
            timeout=TRIAL_S,
            check=False,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 2:  # a mistake, which `launcher.job` words in its last line
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode or not lines:
        raise RunError("the trial failed: " + "\n".join(done.stderr.strip().splitlines()[-3:]))
    measured: dict[str, Any] | None = json.loads(lines[-1])
    return measured
