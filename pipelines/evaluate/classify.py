"""Names the class of images: what a trained head takes them for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.config.data import DataConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from pipelines.data.mixture.class_list import names_in_run
from pipelines.embedding.embed import map_source
from pipelines.embedding.embeddings import Embed


class ClassifiedImages(NamedTuple):
    """The best classes of images.

    Attributes:
        source: folder or URL of the images.
        keys: path of each image below the folder, or its key in the shards.
        classes: int64 `[N, k]`, best first; -1 where there are fewer than k classes.
        scores: float64 `[N, k]`, the head's: s times the cosine for mhs, full and partial_fc, the
            logarithm of a probability for mhp and mhc.
        skipped: paths of images that could not be read.
    """

    source: str
    keys: list[str]
    classes: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    skipped: list[str]


def classify_source(
    embed: Embed, head: Head, source: str, topology: Topology, image_size: int, top: int
) -> ClassifiedImages | None:
    """Name the `top` best classes of a folder of images, or of shards; all ranks must call.

    Args:
        embed, source, topology, image_size: see `embed.embed_source`.
        head: of the same run, on these ranks.
        top: k.

    Returns:
        The classes on rank 0, None elsewhere.

    Raises:
        UserError: there is no image.
    """

    def _predict(pixels: Tensor) -> Tensor:
        found = head.predict(embed(pixels), top)
        # One table of both: float64 holds class ids up to 2**53.
        return torch.cat([found.classes.double(), found.scores.double()], dim=1)

    images = map_source(_predict, source, topology, image_size)
    if images is None:
        return None
    table: npt.NDArray[np.float64] = images.rows.astype(np.float64, copy=False)
    classes, scores = table[:, :top].astype(np.int64), table[:, top:]
    return ClassifiedImages(images.source, images.keys, classes, scores, images.skipped)


def name_classes(data: DataConfig, found: npt.NDArray[np.int64]) -> dict[int, str]:
    """Names of the classes that were found; see `names_in_run`."""
    return names_in_run(data, set(np.unique(found).tolist()))
