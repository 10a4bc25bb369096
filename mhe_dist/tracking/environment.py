"""Versions of the libraries and the commit of the code, recorded with each run."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

COMMIT_VARIABLE = "MHE_GIT_COMMIT"
"""Names the commit of code that was sent to a cluster without its repository."""


_VERSIONED = ("torch", "deepspeed", "ray", "webdataset", "timm", "torchmetrics", "mlflow", "mhe")


def environment_tags() -> dict[str, str]:
    """Versions of the libraries, and the git commit of this code where that is known."""
    return dict(_environment())


@cache
def _environment() -> dict[str, str]:
    tags = {}
    for package in _VERSIONED:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD") if _git("ls-files", Path(__file__).name) else ""
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["git_commit"] = f"{commit}-dirty" if changed else commit
    elif sent := os.environ.get(COMMIT_VARIABLE):
        tags["git_commit"] = sent
    return tags


def _git(*arguments: str) -> str:
    """What git says in this file's folder; empty where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
