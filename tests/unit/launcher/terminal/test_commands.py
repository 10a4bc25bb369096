"""What is printed to be pasted works where it is pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher import cli
from launcher.terminal import commands, console
from launcher.terminal.commands import (
    as_typed,
    command_line,
    invoked_command,
    loading_code,
    serving_command,
)
from launcher.terminal.summary import next_steps
from mhe_dist.config.schema import Config
from mhe_dist.tracking.spool import MetricRecord, Spool

Captured = pytest.CaptureFixture[str]
EXPORTS = {"timm": {"path": "runs/a b/export/timm"}}
PAGE = "#/experiments/1/runs/abc?workflowType=machine_learning"
HTTP = {"uri": "http://mlflow:5000/", "run_id": "abc", "page": PAGE}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in `.venv` of the working directory, which is not active."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("mhe", "mlflow", "python"):
        (folder / name).write_text("#!/bin/sh")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "PROGRAM_FOLDER", folder)
    monkeypatch.setenv("PATH", "/usr/bin")
    return folder


def test_an_active_environment_needs_no_path(environment: Path, monkeypatch) -> None:
    assert command_line(["mhe", "train", "a.yaml"]) == ".venv/bin/mhe train a.yaml"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert command_line(["mhe", "train", "a.yaml"]) == "mhe train a.yaml"


def test_a_folder_elsewhere_is_named_whole(environment: Path, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert command_line(["python", "-c", "1"]) == f"{environment}/python -c 1"
    assert command_line(["ray", "status"]) == "ray status", "not of this environment"


def test_odd_characters_are_quoted(environment: Path, monkeypatch, capsys: Captured) -> None:
    words = ["mhe", "report", """runs/my 'faces' [1]; rm "$HOME" :100: [/red] {a,b}\\"""]
    console.list_next([("a page", words), ("a link", "http://x/#/runs/1")])
    page, link = capsys.readouterr().out.splitlines()[-2:]
    assert shlex.split(page.removeprefix("  a page  ")) == [".venv/bin/mhe", *words[1:]]
    assert link == "  a link  http://x/#/runs/1"
    monkeypatch.setattr("sys.argv", ["/x/mhe", "train", "a b.yaml"])
    assert invoked_command() == ".venv/bin/mhe train 'a b.yaml'"


def run(**sections: object) -> Config:
    data = {"shards": "x"} | dict(sections.pop("data", {}))  # type: ignore[call-overload]
    return Config.model_validate({"run": {"name": "a"}, "data": data, **sections})


def steps(config: Config, mlflow: object, heldout: object) -> dict[str, str | list[str]]:
    return dict(next_steps(config, {"mlflow": mlflow, "exports": EXPORTS, "heldout": heldout}))


def test_next_fits_the_run() -> None:
    photos = steps(run(), None, {})
    assert list(photos) == ["use the backbone", "see it on a page", "export again"]
    glyphs = steps(run(data={"glyphs": {}}), None, {"rank1": 1.0})
    assert {"evaluate again", "other fonts as data"} <= set(glyphs)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"shards": "a", "verification": ["lfw.bin"]}, []),
        ({"verification": ["lfw.bin", "b.bin"]}, ["verification", "--sets", "lfw.bin", "b.bin"]),
        ({"classification": "known"}, ["classification", "--shards", "known"]),
        (
            {"labels": "a", "label_set": "b"},
            ["labels", "--shards", "a", "--labels", "b"],
        ),
    ],
)
def test_the_evaluation_that_is_typed_again_is_one_of_the_run(
    evaluate: dict[str, object], words: list[str]
) -> None:
    """Of a run without held-out shards it was one that was refused."""
    config = run(evaluate=evaluate)
    again = [*words[:1], config.run.path, *words[1:]]
    assert steps(config, None, {"lfw": 1.0})["evaluate again"] == ["mhe", "evaluate", *again]


def test_a_tracking_server_is_linked_and_a_local_store_is_served() -> None:
    assert steps(run(), HTTP, {})["see the curves"] == f"http://mlflow:5000/{PAGE}"
    assert steps(run(), HTTP | {"page": ""}, {})["see the curves"] == "http://mlflow:5000"
    local = steps(run(), HTTP | {"uri": "sqlite:////a b/mlflow.db"}, {})
    served = ["mlflow", "ui", "--backend-store-uri", "sqlite:////a b/mlflow.db"]
    assert local["serve the curves"] == served
    assert local["then see them"] == f"http://127.0.0.1:5000/{PAGE}"


def test_what_mlflow_lacks_is_sent_by_a_command_that_pastes(tmp_path: Path) -> None:
    config = run().model_copy(deep=True)
    config.run.dir = str(tmp_path)
    spool = Spool(tmp_path / "a" / "mlflow")
    assert "mhe sync" not in str(steps(config, HTTP, {}))
    spool.add(MetricRecord(0, 0, {"loss": 1.0}))
    sent = steps(config, HTTP, {})["send MLflow what it lacks, once it runs"]
    assert sent == ["mhe", "sync", f"{tmp_path}/a"]


@pytest.mark.parametrize("export", ["timm", "onnx", "torch-export"])
def test_the_code_that_loads_an_export_survives_the_shell(export: str) -> None:
    code = loading_code(export, """runs/it's "odd"/x""", "iresnet18")
    compile(code, "pasted", "exec")
    assert shlex.split(command_line(["python", "-c", code]))[-1] == code
    assert ("mhe_dist.backbone.iresnet" in code) == (export == "timm")


def test_what_serves_a_model_finds_the_programs_beside_it(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow models serve` starts uvicorn by its name alone."""
    serve = "mlflow models serve -m 'my runs/mlflow' --env-manager local"
    assert serving_command("my runs/mlflow") == f'PATH={environment}:"$PATH" {serve}'
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert serving_command("my runs/mlflow") == serve


def test_the_hint_of_config_keeps_the_overrides(capsys: Captured) -> None:
    assert cli.run(["config", "--table", "quickstart", "optim.lr=0.25", "run.name='a'"]) == 0
    said = capsys.readouterr().out
    words = shlex.join(["quickstart", "optim.lr=0.25", "run.name='a'"])
    assert f"train {words}\n" in said
    assert f"config {words} --yaml\n" in said


def test_a_path_below_the_working_directory_is_shown_as_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_typed(f"{tmp_path}/data/train") == "data/train"
    for path in (str(tmp_path), "s3://bucket/data", f"{tmp_path}2/data", "data"):
        assert as_typed(path) == path
