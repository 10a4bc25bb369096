"""What a driver of a Ray cluster refuses, and what Ray leaves behind. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.ray_cluster.connection import _check_gpus, _move_logs
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError


def config(**scale: Any) -> Config:
    return Config.model_validate({"data": {"shards": "x"}, "scale": scale})


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"scale.workers=2.*has 1.*scale.gpu=false"):
        _check_gpus(config(workers=2, gpu=True), {"GPU": 1.0})
    _check_gpus(config(workers=2, gpu=True), {"GPU": 2.0})
    _check_gpus(config(workers=2), {})


def test_ray_s_logs_are_kept_and_its_folder_is_not(tmp_path: Path) -> None:
    logs = tmp_path / "ray" / "session_7" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("x")
    (tmp_path / "ray" / "session_latest").symlink_to(logs.parent)
    _move_logs(tmp_path / "ray", tmp_path / "kept")
    assert (tmp_path / "kept" / "session_7" / "raylet.out").read_text() == "x"
    assert not (tmp_path / "ray").exists()


def test_a_cluster_that_did_not_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    _move_logs(tmp_path / "ray", tmp_path / "kept")
    assert not list(tmp_path.iterdir())
