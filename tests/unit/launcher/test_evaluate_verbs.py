"""`mhe evaluate ...` on a run with a checkpoint: tables, files, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import cli
from pipelines.evaluate import bootstrap
from tests import tiny
from tests.unit.pipelines import ijb_set

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run whose held-out set is there."""
    folder = tmp_path_factory.mktemp("runs")
    shards = tiny.write_shards(folder / "heldout", classes=8, first=10_000)
    return tiny.trained_run(folder, shards, evaluate={"shards": shards}).run.path


def said(words: list[str], capsys: Captured, code: int = 0) -> str:
    assert cli.run(words) == code
    captured = capsys.readouterr()
    return " ".join((captured.err if code else captured.out).split())


def test_a_run_alone_means_its_heldout_shards(run: str, capsys: Captured) -> None:
    short = said(["evaluate", run], capsys)
    assert short == said(["evaluate", "heldout", run], capsys)
    named = said(["evaluate", f"{run}/checkpoints/step_00000024"], capsys)
    assert named.split("rank-1")[1].split("Next")[0] == short.split("rank-1")[1].split("Next")[0]
    for part in ("rank-1", "(chance 12.5%)", "TAR@FAR=1E-3", "probes", "88"):
        assert part in short


def test_verification_sets(
    run: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 5)
    sets = [tiny.write_bin(tmp_path / name) for name in ("lfw.bin", "cfp_fp.bin")]
    shown = said(["evaluate", "verification", run, "--sets", *sets], capsys)
    for part in ("lfw", "cfp_fp", "ACCURACY", "TAR@FAR=1E-3", "evaluation/verification.json"):
        assert part.lower() in shown.lower()
    found = json.loads(Path(run, "evaluation", "verification.json").read_text())
    assert found["step"] == 24
    assert found["results"]["lfw"] == found["results"]["cfp_fp"]
    assert found["results"]["lfw"]["pairs"] == 40
    assert Path(run, "evaluation", "verification.png").read_bytes()[:4] == b"\x89PNG"


def test_ijb(run: str, tmp_path: Path, capsys: Captured) -> None:
    root = str(ijb_set.write(tmp_path / "IJBC"))
    shown = said(["evaluate", "ijb", run, "--root", root], capsys)
    for part in ("TAR@FAR=1e-06", "1:N rank-1", "TPIR@FPIR=0.01", "evaluation/ijbc.json"):
        assert part in shown
    found = json.loads(Path(run, "evaluation", "ijbc.json").read_text())["results"]
    assert found["templates"] == 32
    assert found["tar@far=1e-6"] <= found["tar@far=1e-1"]


def test_mistakes_are_told_before_a_model_is_loaded(
    run: str, tmp_path: Path, capsys: Captured
) -> None:
    assert "name the sets" in said(["evaluate", "verification", run], capsys, 2)
    (tmp_path / "a.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    message = said(["evaluate", "verification", "nowhere", str(tmp_path / "a.bin")], capsys, 2)
    assert "asks for posix.system" in message
    assert "no run at nowhere" in said(["evaluate", "nowhere"], capsys, 2)
    assert "not a complete checkpoint" in said(["evaluate", f"{run}/checkpoints/step_9"], capsys, 2)
