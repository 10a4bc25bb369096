"""Somebody at a terminal: types `mhe` and reads what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli

MHE = str(Path(sys.executable).parent / "mhe")


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a command says in this process, in one line; of one that fails its error."""
    assert cli.run(words) == code
    captured = capsys.readouterr()
    return " ".join((captured.err if code else captured.out).split())


def mhe(*words: str) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [MHE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
    )


def until(process: subprocess.Popen[str], part: str) -> str:
    """Output up to the line that holds `part`."""
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if part in line:
            return seen
    pytest.fail(f"ended without {part!r}:\n{seen}")
