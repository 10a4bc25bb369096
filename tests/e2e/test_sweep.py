"""`mhe sweep` on a real Ray Tune: interrupted, continued, bad trials stopped early, runs as any."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest

from launcher import cli
from mhe_dist.config.write import save_config
from tests.support import tiny
from tests.support.terminal import mhe, until
from tests.support.waiting import ended

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = 40


def read_table() -> list[dict[str, str]]:
    with Path("runs/sweep/trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_goes_on_and_stops_bad_trials_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train"),
        train={"max_steps": STEPS, "epochs": 1000},
        scale={"workers": 1},
        optim={"warmup_steps": 5},
        evaluate={
            **{"shards": tiny.write_shards(tmp_path / "heldout", 10, 1000)},
            **{"pairs": 100, "every_steps": 10},
        },
    )
    save_config(config, "tiny.yaml")
    # The good one comes first; that none is as good as it is what ends the others.
    Path("space.yaml").write_text("optim.lr: [0.05, 1.0e-9, 2.0e-9]\n")
    command = ["sweep", "tiny.yaml", "space.yaml"]

    first = mhe(*command)
    until(first, "sweep-00000")
    os.kill(first.pid, signal.SIGTERM)
    output = ended(first)
    assert first.returncode == 75, output
    assert "mhe sweep tiny.yaml space.yaml" in output

    second = mhe(*command)
    output = ended(second)
    assert second.returncode == 0, output
    rows = read_table()
    assert rows[0]["run"] == "sweep-00000"
    assert [row["state"] for row in rows] == ["complete", "stopped early", "stopped early"]
    assert int(rows[0]["step"]) == STEPS > int(rows[1]["step"]) >= 10
    assert float(rows[0]["rank1"]) > float(rows[1]["rank1"])

    for row in rows:
        run = f"runs/sweep/{row['run']}"
        assert cli.run(["report", run]) == 0
        assert cli.run(["checkpoint", "inspect", run]) == 0
    third = mhe(*command)
    output = ended(third)
    assert third.returncode == 0, output
    assert read_table() == rows
