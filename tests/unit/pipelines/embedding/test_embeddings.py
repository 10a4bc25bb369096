"""Rows of length 1."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import map_images, normalize_embeddings, normalize_in_place


def test_rows_get_length_1_in_flat_memory() -> None:
    rows = np.random.default_rng(0).standard_normal((100_000, 32)).astype(np.float32)
    rows[5], rows[9_000] = 0, np.inf
    expected = normalize_embeddings(rows).astype(np.float32)
    tracemalloc.start()
    try:
        normalize_in_place(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(rows, expected)
    assert peak < rows.nbytes, "at once, it takes five times as much"


class OneBadImage:
    """100 images, the third of which cannot be read."""

    count = 100

    def read(self, start: int, stop: int, image_size: int) -> torch.Tensor:
        if start == 2:
            raise UserError("3.jpg: no image")
        return torch.zeros(stop - start, 3, image_size, image_size, dtype=torch.uint8)


def test_one_process_tells_of_a_bad_image_at_once() -> None:
    """Nobody waits for it; it went on to the last image."""
    blocks: list[int] = []

    def count(pixels: torch.Tensor) -> torch.Tensor:
        blocks.append(len(pixels))
        return pixels[:, 0, 0]

    with pytest.raises(UserError, match=r"3\.jpg"):
        map_images(count, OneBadImage(), Topology(), 4, block=1)  # type: ignore[arg-type]
    assert len(blocks) <= 3
