"""The notebook of the tutorial, cell by cell in an empty folder, as Jupyter runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "photos.ipynb"
SHELL = "import subprocess as _shell"


def as_script(notebook: Path) -> str:
    """Its code, where a line that begins with `!` is a command."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    run = r"_shell.run('''\1''', shell=True, check=True)"
    return f"{SHELL}\n{re.sub(r'^!(.*)$', run, code, flags=re.MULTILINE)}\n"


def test_the_tutorial_runs_in_an_empty_folder(tmp_path: Path) -> None:
    script = tmp_path / "tutorial.py"
    script.write_text(as_script(NOTEBOOK))
    commands = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"rank-1 (\d+)% on classes never seen, by chance (\d+)%", done.stdout)
    assert found, done.stdout
    rank1, chance = map(int, found.groups())
    assert rank1 > 4 * chance
    assert re.search(r"^\S -> (\S ?){7}$", done.stdout, re.MULTILINE)


def test_the_notebook_is_kept_without_results() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
