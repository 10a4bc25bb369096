"""Shards of images that compress as photographs of faces do, made once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import simplejpeg
from PIL import Image

from mhe_dist.seeds import generator
from pipelines.data.decode import Pixels
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.shards.writer import Sample, ShardWriter

SIDE: Final = 112
QUALITY: Final = 95
CLASSES: Final = 100
_PER_TAR: Final = 2500
_SCALES: Final = ((4, 50.0), (14, 25.0), (28, 16.0), (56, 6.0))  # cells per side, deviation


def make_photos(images: int) -> ShardIndex:
    """Make a data set of that many 112x112 JPEGs of quality 95, about 7.8 kB each.

    It is written to a temporary folder of this user, where the next call finds it again.
    """
    folder = Path(tempfile.gettempdir()) / f"mhe-bench-{os.getuid()}" / f"photos-{images}"
    if not index_exists(str(folder)):
        with ShardWriter(str(folder), "photos") as writer:
            for start in range(0, images, _PER_TAR):
                writer.write(_samples(start, min(images, start + _PER_TAR)))
            writer.finish(CLASSES)
    return ShardIndex.load(str(folder))


def _samples(start: int, stop: int) -> Iterator[Sample]:
    for number in range(start, stop):
        jpeg = simplejpeg.encode_jpeg(_photo(number), quality=QUALITY)
        label = str(number % CLASSES).encode()
        yield Sample(f"{number:07d}", {"jpg": jpeg, "cls": label})


def _photo(number: int) -> Pixels:
    """Noise of several scales, coarse ones stronger, as in natural images."""
    rng = generator(0, "benchmark/photo", number)
    image = np.full((SIDE, SIDE, 3), 128.0)
    for cells, deviation in _SCALES:
        noise = rng.normal(0, deviation, (cells, cells, 3)) + 128
        small = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        image += np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) - 128.0
    return image.clip(0, 255).astype(np.uint8)
