"""A user's own images: identification 1:N, and verification over all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mhe_dist.distributed.topology import Topology
from pipelines.embedding.embeddings import (
    Embed,
    EmbeddedSet,
    describe_protocol,
    embed_labelled,
    gallery_mask,
    normalize_embeddings,
)
from pipelines.embedding.folder import EmbeddingsFolder
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs
from pipelines.evaluate.metrics.identification import identify
from pipelines.evaluate.metrics.roc import FARS, Floats, tar_name
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.storage.worker_pool import HERE, Workers


@dataclass(frozen=True)
class OwnImagesResult:
    """The figures of a user's images.

    Attributes:
        metrics: `rank1`, `rank5`, `chance`, `tar@far=...` of gallery-probe pairs, sizes, and
            `all/tar@far=...` of all pairs.
        skipped_fars: requested FARs of all pairs that would take too much memory.
        roc: FAR and TAR of the gallery-probe pairs.
        protocol: which images are enrolled, in words.
    """

    metrics: dict[str, float]
    skipped_fars: list[float]
    roc: tuple[Floats, Floats]
    protocol: str


def identify_own_images(
    embed: Embed,
    source: str,
    topology: Topology,
    image_size: int,
    flip: bool = True,
    all_pairs_fars: Sequence[float] = (),
    workers: Workers = HERE,
) -> OwnImagesResult | None:
    """Embed labelled images and look the probes up in the gallery; all ranks must call.

    Args:
        embed, topology, image_size, flip: see `embeddings.embed_images`.
        source: see `embeddings.embed_labelled`.
        all_pairs_fars: FARs for `all_pairs.compare_all_pairs`; none: all pairs are not compared.
        workers: who compares all pairs.

    Returns:
        The result on rank 0, None elsewhere.

    Raises:
        UserError: there is nothing to compare.
    """
    found = embed_labelled(embed, source, topology, image_size, flip)
    if found is None:
        return None
    index = ShardIndex.load(source) if index_exists(source) else None
    return _compare(found, describe_protocol(index, flip), all_pairs_fars, workers)


def identify_embeddings(
    folder: EmbeddingsFolder, all_pairs_fars: Sequence[float] = (), workers: Workers = HERE
) -> OwnImagesResult:
    """As `identify_own_images`, of rows that are there.

    Args:
        folder: of the embeddings.
        all_pairs_fars, workers: see `identify_own_images`.
    """
    labels = np.asarray(folder.labels, np.int64)
    found = EmbeddedSet(folder.rows, labels, gallery_mask(folder.index, labels))
    protocol = describe_protocol(folder.index, folder.recipe.flip)
    return _compare(found, protocol, all_pairs_fars, workers)


def _compare(
    found: EmbeddedSet, protocol: str, all_pairs_fars: Sequence[float], workers: Workers
) -> OwnImagesResult:
    rows, labels, gallery = normalize_embeddings(found.embeddings), found.labels, found.gallery
    result = identify(rows[gallery], labels[gallery], rows[~gallery], labels[~gallery])
    metrics = {f"rank{k}": result.rank(k) for k in (1, 5)} | {"chance": result.chance(1)}
    metrics |= {tar_name(far): result.roc.tar(far) for far in FARS}
    metrics |= {"gallery": float(gallery.sum()), "probes": float((~gallery).sum())}
    skipped_fars: list[float] = []
    if all_pairs_fars:
        every = compare_all_pairs(found.embeddings, labels, all_pairs_fars, workers)
        metrics |= {f"all/{tar_name(far)}": tar for far, tar in every.tar.items()}
        metrics |= {"genuine": float(every.genuine), "impostors": float(every.impostors)}
        skipped_fars = every.skipped_fars
    return OwnImagesResult(metrics, skipped_fars, result.roc.curve(0.1), protocol)
