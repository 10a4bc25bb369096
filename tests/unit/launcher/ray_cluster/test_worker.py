"""What a worker's process gets and reports, and where its output goes. Without Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from launcher.ray_cluster.crash_log import find_crash, killed_by_backbone
from launcher.ray_cluster.environment import worker_environment
from launcher.ray_cluster.mailbox import errors_scrubbed
from launcher.ray_cluster.worker import _describe, _report_crash, train_worker
from launcher.tasks import ray_tasks
from mhe_dist.errors import RunError, StorageUnavailable, UserError
from tests.support.config_sections import config

CRASHING = """
import ctypes, sys
from pathlib import Path
from launcher.ray_cluster.worker import redirect_output
def refuse_untrainable():
    ctypes.string_at(0)
redirect_output(Path(sys.argv[1]), sys.argv[2])
refuse_untrainable() if sys.argv[2] == 'first' else ctypes.string_at(0)
"""
SCRIPT = """
import logging, os, sys
from pathlib import Path
from launcher.ray_cluster.worker import redirect_output
redirect_output(Path(sys.argv[1]))
print('printed', flush=True)
logging.getLogger('some.library').info('logged')
logging.getLogger('some.library').info('http://me:planted@h')
os.system('echo child')
"""


def test_a_worker_gets_its_threads_and_no_telemetry() -> None:
    variables = worker_environment(config(scale={"cpus_per_worker": 3}))
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert all(isinstance(value, str) for value in variables.values())


@pytest.mark.parametrize(
    ("error", "user", "final"),
    [
        (UserError("a http://me:pw@h"), True, True),
        (RunError("a http://me:pw@h"), False, True),
        (StorageUnavailable("a http://me:pw@h"), False, False),
        (ConnectionResetError("a http://me:pw@h"), False, False),
    ],
)
def test_only_what_would_come_back_is_final(error: Exception, user: bool, final: bool) -> None:
    described = _describe(error)
    assert (described["user"], described["final"]) == (user, final)
    assert described["message"] == "a http://***@h"


def test_a_worker_writes_everything_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(log)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")
    text = log.read_text()
    assert text.count("printed") == text.count("child") == 2
    assert text.count("INFO some.library: logged") == 2
    assert text.count("INFO some.library: http://***@h") == 2 and "planted" not in text


def test_the_log_says_where_a_signal_killed_a_worker(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    assert find_crash(log, "first") == ""
    for command in ("first", "second"):
        done = subprocess.run([sys.executable, "-c", CRASHING, str(log), command], check=False)
        assert done.returncode == -signal.SIGSEGV
        crash = find_crash(log, command)
        assert crash.startswith("killed by a signal: Segmentation fault in ")
        assert "ctypes/__init__.py:" in crash and crash.endswith(f"; see {log}")
        assert killed_by_backbone(crash) == (command == "first")
    assert find_crash(log, "first") == "", "what another command did is history"


def test_a_network_that_kills_its_process_is_refused_at_the_next_start() -> None:
    sent: list[dict[str, Any]] = []
    _report_crash("killed by a signal: Aborted; see x", 1, sent.append)
    assert sent == [
        {
            "event": "failed",
            "rank": 1,
            "message": "killed by a signal: Aborted; see x",
            "kind": "Signal",
            "user": False,
            "final": False,
        }
    ]
    with pytest.raises(UserError, match=r"model\.name: .* killed by a signal: Aborted \(the first"):
        _report_crash(
            "killed by a signal: Aborted (the first pass of the backbone); see x", 1, sent.append
        )


SIGNED, URL = "https://h/p?sig=planted", "a http://me:planted@h"


def fail(error: Exception) -> None:
    try:
        raise OSError(SIGNED)
    except OSError as cause:
        raise error from cause


def test_what_ray_is_told_of_a_failure_has_no_secrets() -> None:
    shielded = errors_scrubbed((UserError,))(fail)
    with pytest.raises(UserError) as mistake:
        shielded(UserError(URL))
    with pytest.raises(RunError, match=r"^ConnectionResetError: a http://\*\*\*@h$") as failure:
        shielded(ConnectionResetError(URL))
    with pytest.raises(RunError, match=r"^ValueError: no word of it") as caused:
        shielded(ValueError("no word of it"))
    for raised in (mistake, failure, caused):
        assert "planted" not in "".join(traceback.format_exception(raised.value))


def test_an_error_without_secrets_stays_what_it_is() -> None:
    error = ValueError("plain")
    with pytest.raises(ValueError) as raised, errors_scrubbed(()):
        raise error
    assert raised.value is error


def test_tasks_and_workers_tell_ray_no_secrets() -> None:
    with pytest.raises(RunError, match=r"^OSError: a http://\*\*\*@h$"):
        ray_tasks._call(fail, OSError(URL), "")
    assert train_worker.__wrapped__  # type: ignore[attr-defined]
