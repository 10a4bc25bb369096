"""Image files of a folder: read by number, labelled by folder, and refused or marked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhe_dist.errors import UserError
from pipelines.embedding.image_files import folder_classes, list_images


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
