"""`mhe train` as a user meets it: interrupted, continued, complete. Small, but nothing is faked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from launcher import cli
from mhe_dist.config.load import load_config
from mhe_dist.config.write import save_config
from tests.support import tiny
from tests.support.terminal import mhe, until
from tests.support.waiting import ended, processor_s, wait_for

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 40, 10


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML of a run with two workers, evaluation, checkpoints, MLflow and both exports."""
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train"),
        run={"name": "small"},
        train={"max_steps": STEPS, "epochs": 1000},
        scale={"workers": 2},
        evaluate={"shards": tiny.write_shards(tmp_path / "heldout", 10, 1000), "pairs": 100},
        checkpoint={"every_steps": SAVE_EVERY},
        tracking={"mlflow": True},
        export={"formats": ["timm", "onnx"]},
    )
    path = tmp_path / "small.yaml"
    save_config(config, str(path))
    return path


def left_behind(session: int) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def test_interrupted_continued_complete(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = mhe("train", str(config))
    until(first, "checkpoint")
    # Its files are written while training goes on.
    wait_for(lambda: list(config.parent.glob("runs/small/checkpoints/*/manifest.json")))
    os.killpg(first.pid, signal.SIGINT)
    output = ended(first)
    assert first.returncode == 130, output
    assert "goes on from" in output
    wait_for(lambda: not left_behind(first.pid), every_s=0.2)

    second = mhe("train", str(config))
    output = ended(second)
    assert second.returncode == 0, output
    assert "Resumed at step" in output
    for part in ("rank-1", "chance", "images/s", "export/timm", "backbone.onnx", "mlflow ui"):
        assert part in output
    assert "raylet" not in output
    losses, _ = tiny.per_step(load_config(str(config)))
    assert len(losses) == STEPS
    assert sum(losses[-15:]) < sum(losses[:15])

    begin = processor_s()
    third = mhe("train", str(config))
    output = ended(third)
    assert third.returncode == 0, output
    assert "is complete" in output
    assert processor_s() - begin < 10

    assert cli.run(["checkpoint", "inspect", str(config.parent / "runs" / "small")]) == 0
    assert f"step: {STEPS}" in capsys.readouterr().out


@pytest.mark.long
def test_a_mistake_that_a_worker_finds_ends_the_run_at_once(config: Path) -> None:
    process = mhe("train", str(config), "model.name=resnet10x", "run.name=wrong")
    output = ended(process)
    assert process.returncode == 2, output
    assert "did you mean resnet10t" in output
    assert "Traceback" not in output


def test_three_mistakes_are_told_within_five_seconds() -> None:
    begin = processor_s()
    mistakes = ["hed.kind=mhs", "optim.lr=-1", "data.shards=/nowhere"]
    process = mhe("train", str(ROOT / "configs" / "quickstart.yaml"), *mistakes)
    output = ended(process)
    assert processor_s() - begin < 5
    assert process.returncode == 2
    assert output.startswith("error: 3 mistakes")
