"""Image files of a folder: read by number, labelled by folder, and refused or marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from mhe_dist import storage_retry
from mhe_dist.errors import StorageUnavailable, UserError
from pipelines.embedding.image_files import folder_classes, list_images
from tests.support.data.images import encoded


def test_files_that_cannot_be_read_stop_or_are_marked(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8), 200).save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a/2\.png: cannot be read: .*; mend the file"):
        list_images(str(tmp_path)).read(0, 2, 8)
    files = list_images(str(tmp_path), skip_bad=True)
    assert list(files.paths) == ["a/1.png", "a/2.png"]
    images = files.read(0, 2, 8)
    assert images.dtype == torch.uint8
    assert images[0].unique().tolist() == [200]
    assert files.bad.tolist() == [0, 1]
    Image.new("L", (8, 8)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"3\.png: is in no folder"):
        folder_classes(list_images(str(tmp_path)))
    with pytest.raises(UserError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        list_images(str(tmp_path / "empty"))


@pytest.mark.parametrize("faults", [1, 99])
def test_an_image_that_a_store_does_not_give_at_this_moment_is_not_left_out(
    faults: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was counted as one that cannot be decoded, and its embedding was missing."""
    monkeypatch.setattr(storage_retry, "FIRST_WAIT_S", 0.0)
    store = MemoryFileSystem()
    store.pipe("/photos/a/1.png", encoded(np.full((8, 8, 3), 200, np.uint8), "png"))
    plain, errors = store.cat_file, [TimeoutError("later")] * faults

    def now_and_then(_: object, *given: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return plain(*given, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", now_and_then)
    files = list_images("memory://photos", skip_bad=True)
    if faults > 1:
        with pytest.raises(StorageUnavailable):
            files.read(0, 1, 8)
        return
    assert files.read(0, 1, 8).unique().tolist() == [200]
    assert files.bad.tolist() == [0]
