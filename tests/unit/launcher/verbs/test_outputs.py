"""What cannot be written is refused before the work, by every verb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launcher import cli
from launcher.verbs.embedding import audit, cluster
from launcher.verbs.outputs import run_words
from mhe_dist.config.load import load_config
from tests.support.terminal import said

OUTPUTS = {"out", "page"}


def commands_of(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, or those of a group."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for verb, each in command.commands.items():
        yield from commands_of(f"{name} {verb}", each)


COMMANDS = [each for name in cli.VERBS for each in commands_of(name, cli.load_verb(name))]


@pytest.mark.parametrize(
    "out", ["runs/wider", "wider", "/data/exp/wider", "/wider", "s3://b/wider", "memory://a/b/c"]
)
def test_the_words_of_a_run_name_its_place(out: str) -> None:
    config = load_config("quickstart", run_words(out, "--out"))
    assert config.run.path.removeprefix("./") == out


@pytest.mark.parametrize("out", ["runs/my run", "runs/größer", "/"])
def test_a_run_that_could_not_be_called_so_is_not_made(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint", "grow", "nothing", "--classes", "9", "--out", out]
    assert "a run cannot be called" in said(words, capsys, 2)


@pytest.mark.parametrize("verb", ["checkpoint", "index", "audit"])
def test_what_is_measured_here_is_no_url(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A local folder called `memory:` was measured."""
    refusal = said(["bench", verb, "--folder", "memory://b"], capsys, 2)
    assert "--folder memory://b: is measured in files of this machine" in refusal


@pytest.mark.parametrize("words", [["audit", "a"], ["cluster", "a", "--classes", "9"]])
def test_what_is_made_here_is_refused_before_the_work(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(*_: Any) -> None:
        raise AssertionError("it embeds")

    for module in (audit, cluster):
        monkeypatch.setattr(module, "embed_shards", embed)
    refusal = said([*words, "--out", "memory://b/x", "--embeddings", "e"], capsys, 2)
    assert "--out memory://b/x: is made in files of this machine" in refusal


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_what_a_verb_writes_is_looked_at_first(
    name: str,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    (tmp_path / "file").touch()
    for option in (each for each in command.params if each.name in OUTPUTS):
        for target in (f"{tmp_path}/file/below", f"file://{tmp_path}/file/below"):
            words = [*name.split(), option.opts[0], target]
            assert f"{tmp_path}/file: a file stands where a folder" in said(words, capsys, 2)
        words = [*name.split(), option.opts[0], "http://127.0.0.1:9/below"]
        refusal = said(words, capsys, 2)
        assert "a web server takes no files" in refusal or "name a folder here" in refusal
        refusal = said([*name.split(), option.opts[0], "memory://shelf/below"], capsys, 2)
        assert "(The specified bucket does not exist)" in refusal or "a folder here" in refusal
