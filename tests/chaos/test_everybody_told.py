"""SIGTERM to a rank, to its process group, to every descendant: saved, nothing left, bit for bit.

systemd, Slurm and `timeout` tell all processes of a job to stop, not the rank alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import Preempted
from pipelines.pretrain.main import run_pretraining
from tests import tiny

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

LOADERS, STOPPED_WITHIN_S = 2, 60


def main_process(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def group(pid: int) -> None:
    os.killpg(pid, signal.SIGTERM)


def all_descendants(pid: int) -> None:
    """The youngest first: the rank hears of it when its loader processes have."""
    rank = psutil.Process(pid)
    loaders = rank.children(recursive=True)
    assert len(loaders) >= LOADERS
    for process in [*loaders, rank]:
        process.terminate()


def stepping(output: list[str], line: str) -> bool:
    output.append(line)
    return "'event': 'metrics'" in line


def stop(config: Config, temporary: Path, tell: Callable[[int], None]) -> int:
    """Train until a window is recorded, tell the processes to stop; the step of the save."""
    temporary.mkdir()
    file = temporary.parent / "run.yaml"
    file.write_text(config_to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.pretrain", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    output: list[str] = []
    assert process.stdout is not None
    assert any(stepping(output, line) for line in process.stdout), "".join(output)
    loaders = psutil.Process(process.pid).children(recursive=True)
    tell(process.pid)
    rest, _ = process.communicate(timeout=STOPPED_WITHIN_S)
    assert process.returncode == Preempted.exit_code, "".join(output) + rest
    assert [p for p in loaders if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert list(temporary.iterdir()) == []
    saved = CheckpointStore(f"{config.run.path}/checkpoints", Topology()).newest()
    assert saved is not None
    assert f"told to stop after step {saved.step}; everything is saved" in rest
    return saved.step


def test_whoever_is_told_the_run_saves_and_goes_on(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "shards"),
        run={"name": "told"},
        data={"loader_workers": LOADERS},
        train={"max_steps": 48, "epochs": 1000, "log_every": 2},
        checkpoint={"every_steps": 0},
    )
    steps = [
        stop(config, tmp_path / f"temporary_{tell.__name__}", tell)
        for tell in (main_process, group, all_descendants)
    ]
    assert steps == sorted(set(steps)) and steps[-1] < 48, "each went on from the one before"
    run_pretraining(config)
    uninterrupted = config.model_copy(deep=True)
    uninterrupted.run.name = "uninterrupted"
    run_pretraining(uninterrupted)
    assert tiny.per_step(config) == tiny.per_step(uninterrupted)
    assert tiny.differing(config, uninterrupted) == []
