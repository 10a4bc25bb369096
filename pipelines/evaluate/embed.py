"""Embeds images and writes the embeddings to a file."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from mhe_dist.distributed.topology import Topology
from pipelines.evaluate.embeddings import Embed, ShardImages, embed_images, normalize_embeddings
from pipelines.evaluate.sets.image_files import ImageFiles, list_images
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.storage.urls import atomic_write


class EmbeddingsFile(NamedTuple):
    """Size of a written file, and the paths of images that could not be read."""

    rows: int
    dim: int
    skipped: list[str]


def write_embeddings(
    embed: Embed,
    source: str,
    out: str,
    topology: Topology,
    image_size: int,
    flip: bool = False,
    normalize: bool = False,
) -> EmbeddingsFile | None:
    """Embed a folder of images, or a set of shards, into an `.npz` file; all ranks must call.

    The file holds `embeddings` float32 `[N, D]` and, of a folder, `paths` `[N]` below it, sorted;
    of shards, `labels` int64 `[N]` in the order of the index. A file that cannot be decoded is left
    out and named; a bad sample of a shard is an error.

    Args:
        embed: see `embeddings.Embed`.
        source: folder or URL.
        out: path or URL of the file.
        topology, image_size, flip: see `embeddings.embed_images`.
        normalize: scale the embeddings to length 1.

    Returns:
        Size of the file on rank 0, None elsewhere.

    Raises:
        UserError: there is no image.
    """
    if index_exists(source):
        images: Any = ShardImages(ShardIndex.load(source))
        labels_or_bad = images.labels
    else:
        images = list_images(source, skip_bad=True)
        labels_or_bad = images.bad
    rows = embed_images(embed, images, topology, image_size, flip)
    if topology.world_size > 1:  # each rank knows those of the images that it read
        dist.reduce(labels_or_bad, 0, group=topology.host_group)
    if rows is None:
        return None
    arrays: dict[str, npt.NDArray[Any]] = {"embeddings": rows, "labels": labels_or_bad.numpy()}
    skipped: list[str] = []
    if isinstance(images, ImageFiles):
        good = labels_or_bad.numpy() == 0
        paths = np.array(images.paths)
        skipped = paths[~good].tolist()
        arrays = {"embeddings": rows[good], "paths": paths[good]}
    if normalize:
        arrays["embeddings"] = normalize_embeddings(arrays["embeddings"]).astype(np.float32)
    with atomic_write(out) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    number, dim = arrays["embeddings"].shape
    return EmbeddingsFile(number, dim, skipped)
