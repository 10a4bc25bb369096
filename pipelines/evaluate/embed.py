"""Images to a file of embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from mhe_dist.distributed.topology import Topology
from pipelines.evaluate.embeddings import Embed, ShardImages, embed_images, normalised
from pipelines.evaluate.sets import image_files
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.storage.urls import atomic_write


class Written(NamedTuple):
    """What is in the file, and the paths of images that could not be read."""

    rows: int
    dim: int
    skipped: list[str]


def write(
    embed: Embed,
    source: str,
    out: str,
    topology: Topology,
    side: int,
    flip: bool = False,
    normalise: bool = False,
) -> Written | None:
    """Embed a folder of images, or a set of shards, into an `.npz` file; all ranks must call.

    The file holds `embeddings` float32 `[N, D]` and, of a folder, `paths` `[N]` below it, sorted;
    of shards, `labels` int64 `[N]` in the order of the index. A file that is no image is left out
    and named; a bad sample of a shard is an error.

    Args:
        embed: see `embeddings.Embed`.
        source: folder or URL.
        out: path or URL of the file.
        topology, side, flip: see `embeddings.embed_images`.
        normalise: bring the embeddings to length 1.

    Returns:
        What was written, on rank 0; None elsewhere.

    Raises:
        UserError: there is no image.
    """
    if index_exists(source):
        images: Any = ShardImages(ShardIndex.load(source))
        marks = images.labels
    else:
        images = image_files.every(source, skip_bad=True)
        marks = images.bad
    rows = embed_images(embed, images, topology, side, flip)
    if topology.world_size > 1:  # each rank has marked its own images
        dist.reduce(marks, 0, group=topology.host_group)
    if rows is None:
        return None
    found: dict[str, npt.NDArray[Any]] = {"embeddings": rows, "labels": marks.numpy()}
    skipped: list[str] = []
    if isinstance(images, image_files.ImageFiles):
        good = marks.numpy() == 0
        paths = np.array(images.paths)
        skipped = paths[~good].tolist()
        found = {"embeddings": rows[good], "paths": paths[good]}
    if normalise:
        found["embeddings"] = normalised(found["embeddings"]).astype(np.float32)
    with atomic_write(out) as stream:
        np.savez(stream, **found)  # type: ignore[arg-type]
    number, dim = found["embeddings"].shape
    return Written(number, dim, skipped)
