"""`make` says one line for each phase; what pip prints is in a file, which a failure names."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.project_file import PROJECT

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
[ "$2" = venv ] && { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; }
echo "pip was given $*"
echo "no such package" >&2
until [ -z "$PIP_WAITS_FOR" ] || [ -e "$PIP_WAITS_FOR" ]; do sleep 0.02; done
exit $PIP_EXIT
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def prepare(folder: Path, pip_exit: int, target: str) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        (folder / name).touch()
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {**os.environ, "PIP_EXIT": str(pip_exit)}
    return ["make", "--no-print-directory", target, f"PYTHON={python}"], variables


def make(folder: Path, pip_exit: int, target: str = "install") -> subprocess.CompletedProcess[str]:
    command, variables = prepare(folder, pip_exit, target)
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("pip_exit", [0, 1])
def test_in_a_terminal_a_mark_turns_while_pip_works_and_nothing_of_it_stays(
    tmp_path: Path, pip_exit: int
) -> None:
    command, variables = prepare(tmp_path, pip_exit, "install")
    ours, its = pty.openpty()
    turned = tmp_path / "turned"
    variables["PIP_WAITS_FOR"] = str(turned)
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=its, stderr=its) as process:
        os.close(its)
        said = b""
        with suppress(OSError):  # the other end is closed: all has ended, the mark too
            while piece := os.read(ours, 4096):
                said += piece
                if re.search(rb"\r\|\r/", said):
                    turned.touch()
    os.close(ours)
    assert process.returncode == (2 if pip_exit else 0), said
    turning = rb"GB\.\r\n(?:\r[|/\\-])+\r \r"
    assert re.search(turning + (b"pip was given" if pip_exit else b"$"), said), said


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


def test_the_oldest_versions_have_an_environment_of_their_own(tmp_path: Path) -> None:
    done = make(tmp_path, 0, "test-oldest")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".venv").exists()
    log = (tmp_path / ".venv-oldest" / "install.log").read_text()
    assert "-c constraints-oldest.txt -e .[dev,s3,gcs,k8s,tensorboard]" in log
    assert "tests/unit tests/distributed" in done.stdout
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)
    assert not (tmp_path / ".venv-oldest").exists()


@pytest.mark.parametrize(
    ("target", "named", "python"),
    [
        ("test", {}, "python3.11"),
        ("test-oldest", {}, "python3.10"),
        ("test-oldest", {"PYTHON": "mine"}, "mine"),
    ],
)
def test_an_environment_has_its_own_python_unless_one_is_named(
    tmp_path: Path, target: str, named: dict[str, str], python: str
) -> None:
    _, variables = prepare(tmp_path, 0, target)
    for name in ("python3.10", "python3.11"):
        shutil.copy(tmp_path / "python", tmp_path / name)
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    variables.pop("PYTHON", None)
    planned = subprocess.run(
        ["make", "--dry-run", target],
        cwd=tmp_path,
        env=variables | named,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (found,) = re.findall(r"(\S+) -m venv", planned)
    assert Path(found).name == python


def test_every_lower_bound_is_a_version_that_was_tried() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    installed = [extras[name] for name in ("dev", "s3", "gcs", "k8s", "tensorboard")]
    requirements = [Requirement(r) for r in chain(PROJECT["dependencies"], *installed)]
    tried = {r.name: Version(pins[canonicalize_name(r.name)]) for r in requirements}
    bounds = {
        r.name: Version(s.version) for r in requirements for s in r.specifier if s.operator == ">="
    }
    assert tried == bounds
