"""What is said of a checkpoint that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhe_dist.checkpoint.step_folder import describe_missing_step, step_of


def test_the_step_is_in_the_name() -> None:
    assert step_of("s3://bucket/a/checkpoints/step_00000024/") == 24
    assert step_of("runs/step_one") is step_of("runs/a/checkpoints") is None


def test_the_newest_complete_ones_beside_it_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = "a/checkpoints/step_00000099"
    assert describe_missing_step(gone).endswith("; there is no folder a/checkpoints")
    Path("a/checkpoints/step_00000001").mkdir(parents=True)
    assert describe_missing_step("a/checkpoints/step_00000001") == ""
    assert describe_missing_step(gone).endswith("; a/checkpoints holds no complete one")
    for step in range(2, 12):
        Path(f"a/checkpoints/step_{step:08d}").mkdir()
        Path(f"a/checkpoints/step_{step:08d}/manifest.json").touch()
    said = describe_missing_step(gone)
    assert said.startswith(
        f"{gone}: there is no such checkpoint; a/checkpoints holds step_00000004,"
    )
    assert said.endswith(", step_00000011 and 2 older ones")
