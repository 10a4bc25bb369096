"""Embeddings of a set of images over all ranks, the same bits whatever the number of ranks.

A network's output for an image may depend in its last bits on the size of the batch around it. So
the images are embedded in blocks of one constant size, aligned in the set, the last one padded;
neither the number of ranks nor any batch setting changes what a block holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from pipelines.data.sequential import read_in_order
from pipelines.evaluate.sets import image_files
from pipelines.shards.index import ShardIndex, index_exists

BLOCK: Final = 128  # images of one call of `embed`

log = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
"""uint8 `[n, 3, H, W]` on the host to float32 `[n, D]`."""


class EmbeddedSet(NamedTuple):
    """The embeddings of a set, in the order of its index.

    Attributes:
        embeddings: float32 `[N, D]`, with their norms.
        labels: int64 `[N]`.
        gallery: bool `[N]`: enrolled; all others are probes.
    """

    embeddings: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    gallery: npt.NDArray[np.bool_]


class Images(Protocol):
    """Images that are read by their numbers."""

    @property
    def count(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int, side: int) -> Tensor:
        """The images `[start, stop)`, uint8 `[n, 3, side, side]`."""


def embed_images(
    embed: Embed,
    images: Images,
    topology: Topology,
    side: int,
    flip: bool = False,
    block: int = BLOCK,
) -> npt.NDArray[np.float32] | None:
    """Embed every image once; all ranks must call.

    Rank 0 holds the result and one block of each rank, whatever the number of images.

    Args:
        embed: called by every rank equally often (ZeRO 3 communicates in it), always with `block`
            images.
        images: the same on all ranks.
        topology: the ranks; each embeds a contiguous range of blocks.
        side: to which images are brought.
        flip: add the embedding of the mirrored image (docs/formats.md section 2: the raw sum).
        block: images of one call; part of what the result is, so no setting of a run.

    Returns:
        float32 `[count, D]` with their norms on rank 0, None elsewhere: they can be many, and one
        copy on a node is enough.
    """
    rounds = math.ceil(math.ceil(images.count / block) / topology.world_size)
    out: npt.NDArray[np.float32] | None = None
    for turn in range(rounds):
        start = (topology.rank * rounds + turn) * block
        pixels = _block(images, start, block, side)
        rows = embed(pixels)
        if flip:
            rows = rows + embed(pixels.flip(-1))
        for rank, part in _gather(rows.detach().float().cpu(), topology):
            if out is None:
                out = np.empty((images.count, part.shape[1]), np.float32)
            place = (rank * rounds + turn) * block
            if place < images.count:
                out[place : place + block] = part[: images.count - place].numpy()
    return out


def embed_set(
    embed: Embed,
    index: ShardIndex,
    topology: Topology,
    image_size: int,
    flip: bool = False,
    block: int = BLOCK,
) -> EmbeddedSet | None:
    """Embed every sample of a shard set once; all ranks must call; see `embed_images`.

    Returns:
        the set on rank 0, None elsewhere.
    """
    images = ShardImages(index)
    rows = embed_images(embed, images, topology, image_size, flip, block)
    if topology.world_size > 1:  # each rank has seen the labels of its images
        dist.reduce(images.labels, 0, group=topology.host_group)
    if rows is None:
        return None
    labels = images.labels.numpy()
    return EmbeddedSet(rows, labels, roles(index, labels))


class ShardImages:
    """The images of a shard set in the order of its index, and the labels that were met."""

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.count = index, index.samples
        self.labels = torch.zeros(index.samples, dtype=torch.int64)

    def read(self, start: int, stop: int, side: int) -> Tensor:
        """See `Images`; takes down the labels."""
        images, self.labels[start:stop], _ = read_in_order(self.index, start, stop, side)
        return images


def roles(index: ShardIndex, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Who is enrolled: the samples that `index.meta["gallery"]` numbers, or each class's first."""
    enrolled = index.meta.get("gallery")
    if enrolled is None:
        enrolled = np.unique(labels, return_index=True)[1]
    gallery = np.zeros(len(labels), bool)
    gallery[np.asarray(enrolled, np.int64)] = True
    return gallery


def embed_labelled(
    embed: Embed, source: str, topology: Topology, side: int, flip: bool = False
) -> EmbeddedSet | None:
    """Embed a set of shards, or a folder that holds a folder of images for each class.

    All ranks must call. Of a folder, the first image of each class is enrolled.

    Returns:
        the set on rank 0, None elsewhere.

    Raises:
        UserError: `source` is neither.
    """
    if index_exists(source):
        return embed_set(embed, ShardIndex.load(source), topology, side, flip)
    files = image_files.every(source)
    labels = image_files.classes(files)
    rows = embed_images(embed, files, topology, side, flip)
    if rows is None:
        return None
    gallery = np.zeros(len(labels), bool)
    gallery[np.unique(labels, return_index=True)[1]] = True
    return EmbeddedSet(rows, labels, gallery)


def normalised(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """float64 `[N, D]` of length 1.

    A row of zeros stays one. So does, with a warning, a row that is not finite: it is then as close
    to one class as to any other, and ties count against the model.
    """
    rows = embeddings.astype(np.float64)
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        log.warning("%d of %d embeddings are not finite", broken.sum(), len(rows))
        rows[broken] = 0.0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _block(images: Images, start: int, block: int, side: int) -> Tensor:
    """A block, padded with black images; beyond the set it is all padding."""
    stop = min(start + block, images.count)
    pixels = torch.zeros(block, 3, side, side, dtype=torch.uint8)
    if start < stop:
        pixels[: stop - start] = images.read(start, stop, side)
    return pixels


def _gather(rows: Tensor, topology: Topology) -> Iterator[tuple[int, Tensor]]:
    """The rows of each rank, on rank 0."""
    if topology.world_size == 1:
        yield topology.rank, rows
        return
    parts = [torch.empty_like(rows) for _ in range(topology.world_size if topology.is_first else 0)]
    dist.gather(rows, parts or None, group=topology.host_group)
    yield from enumerate(parts)
