"""What `mhe export` says of what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cli
from launcher.verbs.results import Format, _next_steps
from tests.support import tiny
from tests.support.terminal import said


def test_the_next_steps_name_the_files_that_were_written() -> None:
    paths = {
        Format.ONNX: "out/backbone_uint8_fp16.onnx",
        Format.MLFLOW: "out/mlflow",
        Format.HUB_FOLDER: "out/hub",
    }
    steps = {
        what: step if isinstance(step, str) else " ".join(step)
        for what, step in _next_steps(paths, "resnet10t")
    }
    assert list(steps) == [
        "use it (onnx)",
        "serve it (mlflow)",
        "publish it (say the licence first)",
    ]
    for path, step in zip(paths.values(), steps.values(), strict=True):
        assert path in step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # The format is onnx if it is left out; what is wrong is that no class was counted.
        ([], "was written before checkpoints told their classes"),
        (["--to", "onnx"], "was written before checkpoints told their classes"),
        (["--to", "onnx", "--to", "timm"], "--to timm holds the backbone alone"),
        (["--normalize"], "--normalize is for embeddings"),
    ],
)
def test_what_cannot_be_exported_with_the_head(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.trained_run(tmp_path, "unused")
    assert cli.run(["export", run.run.path, "--classify", "5", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_lies_in_the_folder_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for MLflow, what a user has in `mlflow/` and `hub/`, the README of a project."""
    run = Path(tiny.trained_run(tmp_path, "unused").run.path)
    project = tmp_path / "project"
    names = ["mlflow/mine", "hub/mine", "README.md"]
    theirs = [run / "mlflow" / "waiting.jsonl", *(project / name for name in names)]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    monkeypatch.chdir(project)
    export = ["export", str(run)]
    for folder in (str(run), f"{run}/"):
        assert "is the folder of a run" in said(
            [*export, "--to", "mlflow", "--out", folder], capsys, 2
        )
    formats = [word for name in ("mlflow", "hub-folder") for word in ("--to", name)]
    refused = said([*export, *formats, "--out", str(project)], capsys, 2)
    assert "README.md, mlflow/, hub/ there was not written by mhe export" in refused
    assert "--out=.: README.md" in said([*export, "--to", "timm", "--out", "."], capsys, 2)
    assert {file.read_text() for file in theirs} == {"mine"}
    assert sorted(path.name for path in project.iterdir()) == ["README.md", "hub", "mlflow"]
