"""Embeddings of a set of images over all ranks, the same bits whatever the number of ranks.

A network's output for an image may depend in its last bits on the size of the batch around it. So
the images are embedded in blocks of one constant size, aligned in the set, the last one padded;
neither the number of ranks nor any batch setting changes what a block holds.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.failures import raise_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from pipelines.data.sequential import read_in_order
from pipelines.embedding.image_files import folder_classes, list_images
from pipelines.shards.index import ShardIndex, index_exists

BLOCK: Final = 128  # images per call of `embed`
_NORMALIZED: Final = 1 << 13  # rows that are in float64 at a time
_COMPARED: Final = 1 << 20  # labels that are read at a time; mostly the first ones decide

_AGREED: Final = 32  # rounds, after which the ranks tell each other of a failure

log = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
"""uint8 `[n, 3, H, W]` on the host to float32 `[n, D]`."""


class EmbeddedSet(NamedTuple):
    """The embeddings of a set, in the order of its index.

    Attributes:
        embeddings: float32 `[N, D]`, with their norms.
        labels: int64 `[N]`.
        gallery: bool `[N]`: enrolled; all others are probes.
        folders: names of the classes by their numbers, of a folder of images.
    """

    embeddings: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    gallery: npt.NDArray[np.bool_]
    folders: Sequence[str] = ()


class Images(Protocol):
    """Images that can be read by number."""

    @property
    def count(self) -> int:
        """Number of images."""

    def read(self, start: int, stop: int, image_size: int) -> Tensor:
        """The images `[start, stop)`, uint8 `[n, 3, image_size, image_size]`."""

    def part(self, start: int, stop: int) -> Images:
        """The images `[start, stop)` alone, for a process that need not know the others."""

    def findings(self) -> Any:
        """What reading has told of all images, for `add_findings` in another process."""

    def add_findings(self, start: int, findings: Any) -> None:
        """Take in what another process was told of the part that begins with image `start`."""


class SpreadEmbed(ABC):
    """An `Embed` that can also hand a whole set to other processes; rank 0 alone has one."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Embed`."""

    @abstractmethod
    def embed_images(
        self, images: Images, image_size: int, flip: bool, block: int
    ) -> npt.NDArray[np.float32]:
        """See `embed_images`; every block holds the images that it holds there."""


def embed_images(
    embed: Embed,
    images: Images,
    topology: Topology,
    image_size: int,
    flip: bool = False,
    block: int = BLOCK,
) -> npt.NDArray[np.float32] | None:
    """Embed every image once; all ranks must call; see `map_images`.

    Args:
        embed: called with blocks of images, here or, if it is a `SpreadEmbed`, elsewhere.
        images, topology, image_size, block: see `map_images`.
        flip: add the embedding of the mirrored image (docs/formats.md section 2: the raw sum).

    Returns:
        float32 `[count, D]` with their norms on rank 0, None elsewhere: the result can be large.

    Raises:
        UserError, RunError: some rank could not read an image; on all ranks.
    """
    if isinstance(embed, SpreadEmbed):
        return embed.embed_images(images, image_size, flip, block)
    return map_images(block_embedder(embed, flip), images, topology, image_size, block)


def block_embedder(embed: Embed, flip: bool) -> Callable[[Tensor], Tensor]:
    """The function of a block of images that `embed_images` maps; see there."""

    def _embed(pixels: Tensor) -> Tensor:
        rows = embed(pixels)
        if flip:
            rows = rows + embed(pixels.flip(-1))
        return rows.detach().float()

    return _embed


def map_images(
    function: Callable[[Tensor], Tensor],
    images: Images,
    topology: Topology,
    image_size: int,
    block: int = BLOCK,
) -> npt.NDArray[Any] | None:
    """A row for every image, each computed once; all ranks must call.

    Rank 0 holds the result and one block of each rank, whatever the number of images.

    Args:
        function: uint8 `[n, 3, H, W]` on the host to rows `[n, ...]`. Every rank calls it equally
            often (ZeRO 3 communicates in it), always with `block` images.
        images: the same on all ranks.
        topology: the ranks; each has a contiguous range of blocks.
        image_size: width and height that images are resized to.
        block: images per call. The result depends on it, so it is no setting of a run.

    Returns:
        `[count, ...]` of the rows' type on rank 0, None elsewhere.

    Raises:
        UserError, RunError: some rank could not read an image; on all ranks.
    """
    rounds = math.ceil(math.ceil(images.count / block) / topology.world_size)
    out: npt.NDArray[Any] | None = None
    failure: Exception | None = None
    for number in range(rounds):
        start = (topology.rank * rounds + number) * block
        pixels = torch.zeros(block, 3, image_size, image_size, dtype=torch.uint8)
        try:
            _read_block(images, start, pixels)
        except (UserError, RunError, OSError) as error:
            failure = failure or error  # the other ranks wait for this one in every round
        for rank, part in _gather_rows(function(pixels).cpu(), topology):
            if out is None:
                out = np.empty((images.count, *part.shape[1:]), part.numpy().dtype)
            begin = (rank * rounds + number) * block
            if begin < images.count:
                out[begin : begin + block] = part[: images.count - begin].numpy()
        if topology.world_size == 1 or number % _AGREED == 0:
            raise_together(failure, topology)
    raise_together(failure, topology)
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
    labels = images.join_labels(topology)
    return None if rows is None else EmbeddedSet(rows, labels, gallery_mask(index, labels))


class ShardImages:
    """The images of a shard set in the order of its index, and labels and keys of those read.

    Args:
        index: of the shards.
        first, count: the images, by their numbers in the index; left out: all.
    """

    def __init__(self, index: ShardIndex, first: int = 0, count: int | None = None) -> None:
        self.index, self._first = index, first
        self.count = index.samples if count is None else count
        self.labels = torch.zeros(self.count, dtype=torch.int64)
        self.keys: dict[int, str] = {}

    def read(self, start: int, stop: int, image_size: int) -> Tensor:
        """See `Images.read`; also stores labels and keys."""
        images, self.labels[start:stop], keys = read_in_order(
            self.index, self._first + start, self._first + stop, image_size
        )
        self.keys.update(enumerate(keys, start))
        return images

    def part(self, start: int, stop: int) -> ShardImages:
        """See `Images.part`; it has the shards that it needs, and no others."""
        begin, _ = self.index.locate(self._first + start)
        end, _ = self.index.locate(self._first + stop - 1)
        skipped = self._first + start - int(self.index.starts[begin])
        return ShardImages(self.index.cut(begin, end + 1), skipped, stop - start)

    def findings(self) -> Any:
        """Labels, and keys in the order of the images."""
        return self.labels.numpy(), [self.keys[number] for number in range(self.count)]

    def add_findings(self, start: int, findings: Any) -> None:
        """See `Images.add_findings`."""
        labels, keys = findings
        self.labels[start : start + len(labels)] = torch.from_numpy(labels)
        self.keys.update(enumerate(keys, start))

    def join_labels(self, topology: Topology) -> npt.NDArray[np.int64]:
        """On rank 0 the labels of all images; each rank knows those that it read. All must call."""
        if topology.world_size > 1:
            dist.reduce(self.labels, 0, group=topology.host_group)
        return self.labels.numpy()


def describe_protocol(index: ShardIndex | None, flip: bool) -> str:
    """Which image of each class is enrolled, and what is compared; figures depend on both.

    Args:
        index: of the shards; None: a folder of images.
        flip: whether the embedding of the mirrored image is added.
    """
    if index is None:
        enrolled = "the first image of each class by file name"
    elif index.meta.get("gallery") is not None:
        enrolled = "the images that the shards name as gallery"
    else:
        enrolled = "the first image of each class in the order of the shards"
    return f"enrolled: {enrolled}" + ("; mirrored images added" if flip else "")


def gallery_mask(index: ShardIndex, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool `[N]`: enrolled. Those in `index.meta["gallery"]`, else the first of each class."""
    enrolled = index.meta.get("gallery")
    if enrolled is None:
        return first_of_each_class(labels)
    gallery = np.zeros(len(labels), bool)
    gallery[np.asarray(enrolled, np.int64)] = True
    return gallery


def first_of_each_class(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool `[N]`: the first sample of each class."""
    first = np.zeros(len(labels), bool)
    first[np.unique(labels, return_index=True)[1]] = True
    return first


def embed_labelled(
    embed: Embed,
    source: str,
    topology: Topology,
    image_size: int,
    flip: bool = False,
    may_be_one_class: bool = False,
) -> EmbeddedSet | None:
    """Embed a set of shards, or a folder that holds a folder of images for each class.

    All ranks must call. Of a folder, the first image of each class is enrolled.

    Args:
        embed, topology, image_size, flip: see `embed_images`.
        source: folder or URL.
        may_be_one_class: take images that are all of one class, too.

    Returns:
        the set on rank 0, None elsewhere.

    Raises:
        UserError: `source` is neither, or all its images are of one class, as far as that can be
            known before they are embedded.
    """
    if index_exists(source):
        index = ShardIndex.load(source)
        if index.label_column is not None and not may_be_one_class:
            refuse_one_class(source, index.label_column)
        return embed_set(embed, index, topology, image_size, flip)
    files = list_images(source)
    folders, labels = folder_classes(files)
    if not may_be_one_class:
        refuse_one_class(source, labels)
    rows = embed_images(embed, files, topology, image_size, flip)
    if rows is None:
        return None
    return EmbeddedSet(rows, labels, first_of_each_class(labels), folders)


def refuse_one_class(source: str, labels: npt.NDArray[Any]) -> None:
    """Refuse images among which every answer is right.

    Raises:
        UserError: they are all of one class.
    """
    parts = (labels[start : start + _COMPARED] for start in range(0, len(labels), _COMPARED))
    if len(labels) and not any((part != labels[0]).any() for part in parts):
        raise UserError(
            f"{source}: its images are all of one class, so that every answer would be right; name "
            "images of two classes or more"
        )


def normalize_embeddings(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Scale each row to length 1; float64 `[N, D]`.

    A row of zeros stays zero. A row that is not finite becomes zero, with a warning: it is then
    equally close to all classes, and ties count against the model, as do its pairs
    (`pair_sampling.squared_distances`).
    """
    rows = embeddings.astype(np.float64)
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        log.warning("%d of %d embeddings are not finite", broken.sum(), len(rows))
        rows[broken] = 0.0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def normalize_in_place(rows: npt.NDArray[np.float32]) -> None:
    """Scale each row to length 1, see `normalize_embeddings`, without another copy of them."""
    for start in range(0, len(rows), _NORMALIZED):
        rows[start : start + _NORMALIZED] = normalize_embeddings(rows[start : start + _NORMALIZED])


def _read_block(images: Images, start: int, pixels: Tensor) -> None:
    """Fill a black block `[n, 3, H, W]` with the images from `start` on, as far as there are."""
    stop = min(start + len(pixels), images.count)
    if start < stop:
        pixels[: stop - start] = images.read(start, stop, pixels.shape[-1])


def _gather_rows(rows: Tensor, topology: Topology) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, its rows) on rank 0."""
    if topology.world_size == 1:
        yield topology.rank, rows
        return
    parts = [torch.empty_like(rows) for _ in range(topology.world_size if topology.is_first else 0)]
    dist.gather(rows, parts or None, group=topology.host_group)
    yield from enumerate(parts)
