"""What cannot be written is refused before the work, by every verb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from tests.terminal import said

OUTPUTS = {"out", "page"}


def commands_of(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, or those of a group."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for verb, each in command.commands.items():
        yield from commands_of(f"{name} {verb}", each)


COMMANDS = [each for name in cli.VERBS for each in commands_of(name, cli.load_verb(name))]


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_what_a_verb_writes_is_looked_at_first(
    name: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for option in (each for each in command.params if each.name in OUTPUTS):
        for target in (f"{tmp_path}/file/below", f"file://{tmp_path}/file/below"):
            words = [*name.split(), option.opts[0], target]
            assert f"{tmp_path}/file: a file stands where a folder" in said(words, capsys, 2)
        words = [*name.split(), option.opts[0], "http://127.0.0.1:9/below"]
        refusal = said(words, capsys, 2)
        assert "a web server takes no files" in refusal or "name a folder here" in refusal
