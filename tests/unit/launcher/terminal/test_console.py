"""The terminal is for our consoles alone; tested in a process of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launcher.terminal import console

SCRIPT = """
import os, sys
from pathlib import Path
from launcher.terminal import console
with console.capture_logs(Path(sys.argv[1])):
    console.say('ours')
    console.error('ours too')
    print('theirs')
    os.write(2, b'native\\n')
    os.system('echo child')
print('after')
console.say('again')
"""


def test_only_our_own_output_reaches_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "driver.log"
    command = [sys.executable, "-c", SCRIPT, str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ours", "after", "again"]
    assert done.stderr == "error: ours too\n"
    assert sorted(log.read_text().split()) == ["child", "native", "theirs"]


def test_a_spinner_shows_a_path_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(console, "out", screen)
    with console.status("growing runs/x[/y] [old]"):
        pass
    assert "growing runs/x[/y] [old]" in file.getvalue()
