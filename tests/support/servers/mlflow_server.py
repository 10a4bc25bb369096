"""A real `mlflow server` on the loopback interface."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_for

VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eight processes beside the server, for what no run asks of it: evaluations of language models.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Serve from `folder`, which keeps the database, the artifacts and the log; killed at the end.

    Args:
        folder: of the server.
        port: that it listens on.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | VARIABLES,
        )
    try:
        wait_for(lambda: process.poll() is not None or answers(port), every_s=0.2)
        assert process.poll() is None, (folder / "log").read_text()
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too; the session is its own
        process.wait()


def answers(port: int) -> bool:
    """Whether a server on that port says that it is well."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
