"""`mhe evaluate` of runs in a store, and with the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launcher import cli
from launcher.verbs.evaluate import shared
from mhe_dist.errors import UserError
from pipelines.report import evaluation
from pipelines.storage.worker_pool import HERE, Workers
from tests.support import tiny


@pytest.fixture
def in_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run in a store that MLflow has a record of, whose server is not named here."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = tiny.trained_run(tmp_path, "nowhere", "abc", tracking={"mlflow": True})
    url = f"memory://{tmp_path.name}/runs/run"
    fsspec.filesystem("memory").put(settings.run.path, url, recursive=True)
    return url


def written(url: str) -> list[str]:
    return list(fsspec.filesystem("memory").find(f"{url}/evaluation"))


@pytest.mark.parametrize("verb", ["verification", "classification"])
def test_figures_that_cannot_be_logged_are_told_before_the_work(
    in_store: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [tiny.write_bin(tmp_path / "lfw.bin")] if verb == "verification" else ["--shards", "x"]
    assert cli.run(["evaluate", verb, in_store, *more]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be added to its run in MLflow" in said
    assert "MLFLOW_TRACKING_URI, or add --no-mlflow" in said
    assert written(in_store) == []


def test_without_mlflow_they_are_shown(
    in_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = tiny.write_bin(tmp_path / "lfw.bin")
    assert cli.run(["evaluate", "verification", in_store, sets, "--no-mlflow"]) == 0
    assert len(written(in_store)) == 2
    assert "see it" in capsys.readouterr().out


def test_a_mistake_after_the_work_is_a_warning(
    in_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("this cannot be")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(evaluation, "log_evaluation", fail)
    sets = tiny.write_bin(tmp_path / "lfw.bin")
    assert cli.run(["evaluate", "verification", in_store, sets]) == 0
    said = capsys.readouterr().out
    assert "this cannot be; the files above have them" in " ".join(said.split())
    assert "see it" in said


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["--workers", "1"], None),
        (["--workers", "0"], (0, "")),
        (["--address", "auto"], (0, "auto")),
        (["--address", "auto", "--workers", "1"], (1, "auto")),
    ],
)
def test_a_cluster_works_on_as_much_as_it_has_room_for(
    words: list[str], wanted: tuple[int, str] | None, tmp_path: Path, monkeypatch: Any
) -> None:
    chosen: list[tuple[int, str]] = []

    @contextmanager
    def choose(count: int, gpu: bool, address: str) -> Iterator[Workers]:
        chosen.append((count, address))
        yield HERE

    monkeypatch.setattr(shared, "choose_workers", choose)
    run = tiny.trained_run(tmp_path, "nowhere").run.path
    sets = tiny.write_bin(tmp_path / "lfw.bin", pairs=20)
    assert cli.run(["evaluate", "verification", run, sets, *words]) == 0
    assert chosen == ([] if wanted is None else [wanted])
