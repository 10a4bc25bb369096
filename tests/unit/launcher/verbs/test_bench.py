"""Mistakes in the options of `mhe bench`, found before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cli
from pipelines.bench.counted import run_costs
from tests.support import tiny


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--backbone", "iresnet19"], "--backbone iresnet19: timm has no such model"),
        (["train", "--precision", "fp16"], "Invalid value for '--precision'"),
        (["classifier", "--classes", "10", "--top", "50"], "--top 50: there are 10 classes"),
        (["classifier", "--kinds", "mhs"], "--kinds mhs: there is full, mhp, mhc"),
        (["head", "--kinds", "fll"], "--kinds fll: there is full"),
    ],
)
def test_mistakes_in_options(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "--images", "10_000_000_000_000", "--folder"], "choose another folder"),
        (["index", "--samples", "10_000_000_000_000", "--folder"], "choose another folder"),
        (["classifier", "--classes", "10_000_000_000_000", "--out"], "no head fits"),
    ],
)
def test_what_is_refused_leaves_no_folder(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "new" / "below", there):
        assert cli.run(["bench", *words, str(folder)]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.rglob("*")) == [there]


def test_a_measurement_leaves_no_folder(tmp_path: Path) -> None:
    words = ["checkpoint", "--mib", "1", "--rounds", "1", "--folder", str(tmp_path / "new")]
    assert cli.run(["bench", *words]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"For {tiny.CLASSES} classes and {tiny.CLASSES * tiny.IMAGES} images"),
        (["--classes", "5_000"], f"For 5,000 classes and {tiny.CLASSES * tiny.IMAGES} images"),
        (["data.shards=nowhere"], "For 1,000,000 classes and 10,000,000 images"),
    ],
)
def test_a_plan_says_what_it_is_for(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was of a million classes under the name of a set that has others."""
    monkeypatch.setattr(run_costs, "cost_of_run", lambda *_: {})
    shards = tiny.write_shards(tmp_path / "train")
    assert cli.run(["bench", "plan", "quickstart", f"data.shards={shards}", *words]) == 0
    assert says in capsys.readouterr().out
