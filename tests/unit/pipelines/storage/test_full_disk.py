"""A full disk is told with its path and what is free, whatever was being written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from pipelines.storage import full_disk
from pipelines.storage.full_disk import describe_full_disk

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_fullest_disk_that_the_command_names_stands_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "roomy").mkdir()

    def disk_of(folder: str) -> tuple[int, int]:
        return (1, 0) if folder.endswith("full") else (2, 5 << 20)

    monkeypatch.setattr(full_disk, "_disk_of", disk_of)
    said = describe_full_disk(FULL, ["embed", "--out", "roomy/rows", "run.dir=full/a/b"])
    assert said == (
        f"the disk is full. Free: 0 MiB in {tmp_path}/full, 5 MiB in {tmp_path}. Make room; "
        "then type the command again."
    )


def test_a_file_that_the_system_names_is_named(tmp_path: Path) -> None:
    path = f"{tmp_path}/no/rows.npy"
    said = describe_full_disk(OSError(errno.EDQUOT, "quota", path), [])
    assert said.startswith(f"{path}: your quota of the disk is used up. Free: ")
    assert f" MiB in {tmp_path}. Make room" in said
    assert not describe_full_disk(OSError(errno.EIO, "input/output error"), [])


def test_every_verb_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise FULL

    monkeypatch.setattr("launcher.verbs.train.load_config", fail)
    assert cli.run(["train", "a.yaml"]) == 1
    said = capsys.readouterr().err
    assert "error: the disk is full. Free: " in said and "Errno" not in said
