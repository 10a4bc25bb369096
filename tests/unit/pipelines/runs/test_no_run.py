"""What is given for a run, and is none, is told as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.runs.no_run import describe_what_is_there


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, its configuration, another one, and a data set."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a/checkpoints/step_00000003", "runs/b", "data", "photos"):
        Path(folder).mkdir(parents=True)
    for file in ("runs/a/config.yaml", "runs/b/config.yaml", "data/index.json", "notes.txt"):
        Path(file).touch()
    Path("a.yaml").write_text("run: {name: a}\ndata: {shards: data}\n")
    Path("c.yml").write_text("run: {name: c}\ndata: {shards: data}\n")
    Path("wrong.yaml").write_text("rum: {}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.yaml", "a.yaml is a configuration, and its run is runs/a: name that"),
        ("c.yml", "whose run does not exist yet: mhe train c.yml makes runs/c"),
        ("quickstart", "does not exist yet: mhe train quickstart makes runs/quickstart"),
        ("wrong.yaml", "wrong.yaml is a configuration, and a run is the folder that mhe train"),
        ("notes.txt", "notes.txt is a file, and a run is a folder"),
        ("runs/a/checkpoints/", "runs/a/checkpoints lies in the run runs/a: name that"),
        ("runs/a/config.yaml", "lies in the run runs/a: name that"),
        ("runs/a/export/timm/README.md", "lies in the run runs/a: name that"),
        ("runs", "runs holds a, b: name one as runs/NAME"),
        ("data", "data is a data set: name the run that trained on it"),
        ("photos", "runs holds a, b: name one as runs/NAME"),
        ("typo", "runs holds a, b: name one as runs/NAME"),
    ],
)
def test_what_it_is_and_what_to_type(home: Path, given: str, words: str) -> None:
    assert words in describe_what_is_there(given, "runs")
    absolute = f"{home}/{given}"
    if Path(absolute).exists() and "runs/" in given:
        assert f"lies in the run {home}/runs/a" in describe_what_is_there(absolute, "runs")


def test_of_many_runs_the_first_are_named(home: Path) -> None:
    for number in range(10):
        folder = home / "many" / f"r{number}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    said = describe_what_is_there("many", "runs")
    assert "many holds r0, r1" in said and "r7 and 2 more: name one" in said


def test_nothing_is_there_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_what_is_there("a", "runs") == "name the run's folder, such as runs/quickstart"
