"""`make` says one line for each phase; what pip prints is in a file, which a failure names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
[ "$2" = venv ] && { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; }
echo "pip was given $*"
echo "no such package" >&2
exit $PIP_EXIT
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def make(folder: Path, pip_exit: int) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {**os.environ, "PIP_EXIT": str(pip_exit)}
    command = ["make", "--no-print-directory", "install", f"PYTHON={python}"]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def test_pip_prints_into_a_file(tmp_path: Path) -> None:
    done = make(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["Making", "Installing"]
    log = (tmp_path / ".venv" / "install.log").read_text()
    assert "-c constraints.txt -e .[dev,s3,gcs,k8s,tensorboard]" in log and "no such" in log


def test_a_failure_shows_the_end_of_the_file_and_names_it(tmp_path: Path) -> None:
    failed = make(tmp_path, 1)
    assert failed.returncode == 2
    assert "no such package" in failed.stdout
    assert ".venv/install.log has all of it" in failed.stdout
    assert not (tmp_path / ".venv" / ".installed").exists()
