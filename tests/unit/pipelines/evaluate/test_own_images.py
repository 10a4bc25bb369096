"""Images of one class say nothing about a backbone: every answer would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import refuse_one_class
from pipelines.evaluate.own_images import identify_embeddings, identify_own_images
from pipelines.evaluate.probe import probe_images
from pipelines.shards.index import ShardIndex
from tests.support import tiny


def never(images: Tensor) -> Tensor:
    raise AssertionError("nothing is embedded")


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Three images of one class."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / "photos" / "a" / f"{number}.png")
    return str(tmp_path / "photos")


def test_one_class_is_refused_before_anything_is_embedded(photos: str, tmp_path: Path) -> None:
    for source in (photos, tiny.write_shards(tmp_path / "shards", classes=1)):
        words = f"{source}: its images are all of one class, .* two classes or more"
        with pytest.raises(UserError, match=words):
            identify_own_images(never, source, Topology(), 8)
        with pytest.raises(UserError, match=words):
            probe_images(never, source, "", Topology(), 8)


def test_a_folder_of_embeddings_of_one_class_is_refused(tmp_path: Path) -> None:
    index = ShardIndex.load(tiny.write_shards(tmp_path / "shards", classes=1))
    rows = np.eye(index.samples, 4, dtype=np.float32)
    embedded = mock.Mock(index=index, rows=rows, labels=index.label_column, path="rows")
    with pytest.raises(UserError, match="rows: its images are all of one class"):
        identify_embeddings(embedded)


def test_of_many_labels_only_as_many_are_read_as_it_takes() -> None:
    class Column:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, key: int | slice) -> Any:
            assert isinstance(key, int) or (key.start == 0 and key.stop < 10**8)
            return np.arange(1000)[key]

    refuse_one_class("shards", cast(Any, Column()))


def test_two_classes_are_compared(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards", classes=2)
    found = identify_own_images(mean_colour, shards, Topology(), tiny.SIDE)
    assert found is not None and found.metrics["chance"] == 0.5
