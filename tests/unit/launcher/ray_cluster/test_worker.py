"""What a worker's process gets and reports, and where its output goes. Without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.ray_cluster.environment import worker_environment
from launcher.ray_cluster.worker import _describe
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError

SCRIPT = """
import logging, os, sys
from pathlib import Path
from launcher.ray_cluster.worker import redirect_output
redirect_output(Path(sys.argv[1]))
print('printed', flush=True)
logging.getLogger('some.library').info('logged')
os.system('echo child')
"""


def config(**scale: Any) -> Config:
    return Config.model_validate({"data": {"shards": "x"}, "scale": scale})


def test_a_worker_gets_its_threads_and_no_telemetry() -> None:
    variables = worker_environment(config(cpus_per_worker=3))
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert all(isinstance(value, str) for value in variables.values())


@pytest.mark.parametrize(
    ("error", "user", "final"),
    [
        (UserError("a"), True, True),
        (RunError("a"), False, True),
        (ConnectionResetError("a"), False, False),
    ],
)
def test_only_what_would_come_back_is_final(error: Exception, user: bool, final: bool) -> None:
    described = _describe(error)
    assert (described["user"], described["final"]) == (user, final)
    assert described["message"] == "a"


def test_a_worker_writes_everything_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(log)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert (done.stdout, done.stderr) == ("", "")
    text = log.read_text()
    assert text.count("printed") == text.count("child") == 2
    assert text.count("INFO some.library: logged") == 2
