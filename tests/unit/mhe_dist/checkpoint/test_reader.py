"""Reading a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

from launcher.signals import Interrupted
from mhe_dist.errors import RunError
from pipelines.runs.warm_start import find_checkpoint
from tests import tiny


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Interrupted(2), Interrupted),
        (OSError(5), RunError),
    ],
)
def test_ctrl_c_is_told_from_files_that_cannot_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
) -> None:
    checkpoint = find_checkpoint(tiny.trained_run(tmp_path, "tiny").run.path)

    def read_data(*_: object) -> None:
        raise raised

    monkeypatch.setattr(FsspecReader, "read_data", read_data)
    with pytest.raises(expected):
        checkpoint.load(lambda name: True)
