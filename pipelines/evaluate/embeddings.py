"""Embeddings of a shard set over all ranks, the same bits whatever the number of ranks.

A network's output for an image may depend in its last bits on the size of the batch around it. So
the images are embedded in blocks of one constant size, aligned in the set, the last one padded;
neither the number of ranks nor any batch setting changes what a block holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.topology import Topology
from pipelines.shards import ShardIndex
from pipelines.stream import read_in_order

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


def embed_set(
    embed: Embed,
    index: ShardIndex,
    topology: Topology,
    image_size: int,
    flip: bool = False,
    block: int = BLOCK,
) -> EmbeddedSet | None:
    """Embed every sample of a set once; all ranks must call.

    Args:
        embed: called by every rank equally often (ZeRO 3 communicates in it), always with `block`
            images.
        index: the set.
        topology: the ranks; each embeds a contiguous range of blocks.
        image_size: side to which images are brought.
        flip: add the embedding of the mirrored image (FORMATS.md: the raw sum).
        block: images of one call; part of what the result is, so no setting of a run.

    Returns:
        the set on rank 0, None elsewhere: it can be large, and one copy on a node is enough.
    """
    rounds = math.ceil(math.ceil(index.samples / block) / topology.world_size)
    first = topology.rank * rounds * block
    rows, labels = [], []
    for start in range(first, first + rounds * block, block):
        images, numbers = _read(index, start, block, image_size)
        out = embed(images)
        if flip:
            out = out + embed(images.flip(-1))
        rows.append(out.detach().float().cpu())
        labels.append(numbers)
    gathered = _gather(torch.cat(rows), topology), _gather(torch.cat(labels), topology)
    if gathered[0] is None or gathered[1] is None:
        return None
    classes = gathered[1][: index.samples].numpy()
    return EmbeddedSet(gathered[0][: index.samples].numpy(), classes, roles(index, classes))


def roles(index: ShardIndex, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Who is enrolled: the samples that `index.meta["gallery"]` numbers, or each class's first."""
    enrolled = index.meta.get("gallery")
    if enrolled is None:
        enrolled = np.unique(labels, return_index=True)[1]
    gallery = np.zeros(len(labels), bool)
    gallery[np.asarray(enrolled, np.int64)] = True
    return gallery


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


def _read(index: ShardIndex, start: int, block: int, image_size: int) -> tuple[Tensor, Tensor]:
    """A block, padded with black images of class -1; beyond the set it is all padding."""
    stop = min(start + block, index.samples)
    images = torch.zeros(block, 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.full((block,), -1, dtype=torch.int64)
    if start < stop:
        images[: stop - start], labels[: stop - start], _ = read_in_order(
            index, start, stop, image_size
        )
    return images, labels


def _gather(rows: Tensor, topology: Topology) -> Tensor | None:
    """The rows of all ranks in their order, on rank 0."""
    if topology.world_size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(topology.world_size if topology.is_first else 0)]
    dist.gather(rows, parts or None, group=topology.host_group)
    return torch.cat(parts) if parts else None
