"""Reading a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.signals import Interrupted
from mhe_dist.checkpoint.files import CheckpointFolder
from mhe_dist.errors import RunError, StorageUnavailable
from pipelines.runs.warm_start import find_checkpoint
from tests.support import tiny


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Interrupted(2), Interrupted),
        (OSError(5), StorageUnavailable),
        (FileNotFoundError(2), RunError),
    ],
)
@pytest.mark.usefixtures("prompt_retries")
def test_ctrl_c_is_told_from_files_that_cannot_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
) -> None:
    checkpoint = find_checkpoint(tiny.trained_run(tmp_path, "tiny").run.path)

    def cat_file(*_: object, **__: object) -> None:
        raise raised

    checkpoint.names()
    monkeypatch.setattr(type(CheckpointFolder(checkpoint.path).fs), "cat_file", cat_file)
    with pytest.raises(expected):
        checkpoint.load(lambda name: True)
