"""`mhe audit`: from shards and a backbone to findings and a label set; what decisions change."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from launcher import cli
from launcher.verbs.embedding import audit, shared
from mhe_dist.config.write import save_config
from mhe_dist.errors import RunError
from pipelines.audit.findings import IDENTITY, read_findings
from pipelines.embedding.folder import EmbeddingsFolder
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelLists, LabelSet, write_label_set
from pipelines.storage.worker_pool import HERE
from tests.support import tiny
from tests.support.terminal import said

Captured = pytest.CaptureFixture[str]
WRONG = 12  # images of another class


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a label set that puts some images into other classes, and a YAML file."""
    folder = tmp_path_factory.mktemp("data")
    index = ShardIndex.load(tiny.write_shards(folder / "shards"))
    save_config(tiny.config(folder, index.folder), f"{folder}/small.yaml")
    labels = index.labels_of(np.arange(index.samples))
    assert labels is not None
    labels[:WRONG] = (labels[:WRONG] + 7) % tiny.CLASSES
    write_label_set(
        f"{folder}/labels",
        index,
        tiny.CLASSES,
        lambda: [LabelLists(np.arange(1, len(labels) + 1), labels)],
        [f"name {number}" for number in range(tiny.CLASSES)],
    )
    return folder


def killed(*_: object) -> None:
    raise RunError("killed")


def command(data: Path, out: str, *more: str) -> list[str]:
    words = ["audit", f"{data}/small.yaml", "--labels", f"{data}/labels", "--out", f"{data}/{out}"]
    return [*words, "--workers", "1", *more]


@pytest.fixture(scope="module")
def made(data: Path) -> Path:
    """An audit by the untrained backbone; this process embeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "choose_workers", lambda *_: nullcontext(HERE))
        assert cli.run(command(data, "audit", "--against", f"{data}/shards")) == 0
    return data / "audit"


@pytest.fixture(scope="module")
def other_run(data: Path) -> str:
    """A run with other weights."""
    return tiny.trained_run(data / "runs", f"{data}/shards", run={"name": "other"}).run.path


def test_findings_and_a_label_set_are_written(data: Path, made: Path) -> None:
    index = ShardIndex.load(f"{data}/shards")
    findings, labels = read_findings(str(made)), LabelSet.load(str(made / "labels"))
    labels.require_index(index)
    figures = json.loads((made / "figures.json").read_text())
    assert figures["totals"]["images"] == index.samples and figures["false_rate"] == 0.01
    leaks = findings.of(findings["kind"] == "leak")
    copied = leaks.of(leaks["sample"] >= 0)
    assert len(copied) == index.samples  # the data set was compared with itself
    assert set(copied["neighbour_set"]) == {f"{data}/shards"}
    assert all(name.startswith("name ") for name in copied["class_name"])
    assert labels.labelled == 0 and labels.meta["applied"]["drop"] == len(copied)
    assert EmbeddingsFolder.open(f"{made}-embeddings").recipe.samples == index.samples
    assert "name 7" in (made / "audit.html").read_text()
    assert not list(data.glob(".audit*"))


def test_decisions_change_the_label_set_alone(
    data: Path, made: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(shared, "choose_workers")  # nothing is embedded again
    decided = Path(shutil.copytree(made, data / "decided"))
    before = (made / "findings.parquet").read_bytes()
    decisions = data / "decisions.csv"
    text = (decided / "decisions.csv").read_text()
    lines = [line + "reject" if line.startswith("leak,") else line for line in text.split("\n")]
    decisions.write_text("\n".join(lines))
    more = "--against", f"{data}/shards", "--decisions", str(decisions)
    output = said(command(data, "decided", *more, "--apply", "relabel,drop"), capsys)
    assert f"{decided} is complete: its findings are used" in output
    labels = LabelSet.load(str(decided / "labels"))
    dropped = labels.meta["applied"]["drop"]
    assert labels.labelled == labels.samples - dropped and dropped < 10
    assert labels.meta["decisions"] == str(decisions)
    assert (decided / "findings.parquet").read_bytes() == before
    assert f"data.labels={decided}/labels" in output
    assert not list(decided.glob(".labels*"))


def test_findings_of_another_model_are_refused_but_for_decisions_about_them(
    data: Path, made: Path, other_run: str, capsys: Captured
) -> None:
    """They were used, without a word."""
    words = command(data, "audit", "--shards", f"{data}/shards", "--against", f"{data}/shards")
    words[1] = other_run
    message = said(words, capsys, 2)
    assert f"--out {made}: is an audit by {made}-model/checkpoints/step_00000000" in message
    assert "(step 0, sha256:" in message and "name that checkpoint as RUN" in message
    assert f", not by {other_run}/checkpoints/step_00000024 (step 24, sha256:" in message
    decided = said([*words, "--decisions", f"{made}/decisions.csv"], capsys)
    assert f"{made} is complete: its findings are used" in decided


def test_findings_of_before_do_not_tell_their_model(
    data: Path, made: Path, other_run: str, capsys: Captured
) -> None:
    shutil.copytree(made, data / "older")
    figures = json.loads((made / "figures.json").read_text())
    del figures["made_of"]["model"]
    (data / "older" / "figures.json").write_text(json.dumps(figures))
    words = command(data, "older", "--shards", f"{data}/shards", "--against", f"{data}/shards")
    words[1] = other_run
    shown = said(words, capsys)
    assert f"warning: {data}/older: an older mhe audit made it" in shown
    assert f"{data}/older is complete: its findings are used" in shown


def test_a_begun_audit_does_not_go_on_with_another_model(
    data: Path, other_run: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "choose_workers", lambda *_: nullcontext(HERE))
    monkeypatch.setattr(audit, "_write_down", killed)
    assert "killed" in said(command(data, "begun"), capsys, 1)
    words = command(data, "begun", "--shards", f"{data}/shards")
    words[1] = other_run
    message = said(words, capsys, 2)
    assert f"{data}/begun-embeddings: holds embeddings with model" in message
    assert "(step 0, sha256:" in message and "(step 24, sha256:" in message
    message = said([*words, "--embeddings", f"{data}/other-embeddings"], capsys, 2)
    assert "an interrupted attempt with another source or other settings" in message
    assert "model was sha256:" in message and "step was 0, is 24" in message
    assert f"or delete {data}/.begun.partial" in message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "OUT/audit"], "is an audit of something else: the sets of --against differ"),
        (["--apply", "fix"], "--apply fix: 'fix' is no action"),
        (["--false-rate", "0.7"], "--false-rate 0.7: this is the share of what is right"),
        (["--labels", "OUT/nowhere"], "no label set here"),
        (["--decisions", "OUT/none.csv", "--against", "OUT/shards"], "none.csv: cannot be opened"),
    ],
)
def test_mistakes_are_named(
    data: Path, made: Path, capsys: Captured, more: list[str], words: str
) -> None:
    more = [word.replace("OUT", str(data)) for word in more]
    assert words in said([*command(data, "audit"), *more], capsys, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("kind,sample\n", "has no column 'class'"),
        (f"{','.join((*IDENTITY, 'decision'))}\n{',' * len(IDENTITY)}maybe\n", "write accept or"),
    ],
)
def test_decisions_are_read_before_anything_is_compared(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    content: str,
    words: str,
) -> None:
    (tmp_path / "decisions.csv").write_text(content)
    monkeypatch.delattr(audit, "find_faults")
    more = ["--decisions", f"{tmp_path}/decisions.csv"]
    assert words in said([*command(data, "fresh"), *more], capsys, 2)


def test_sets_of_against_are_opened_before_anything_is_embedded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.delattr(audit, "find_faults")
    words = command(data, "fresh", "--against", f"{tmp_path}")
    assert f"{tmp_path}: no shards here" in said(words, capsys, 2)


def test_a_run_or_a_yaml_file_is_asked_for(data: Path, capsys: Captured) -> None:
    words = ["audit", "nothing", "--out", f"{data}/other"]
    assert "error: nothing: no YAML file, and no run at nothing" in said(words, capsys, 2)
