"""A user's own images: identification 1:N, and verification over all pairs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhe_dist.distributed.topology import Topology
from pipelines.embedding.embeddings import (
    Embed,
    EmbeddedSet,
    describe_protocol,
    embed_labelled,
    gallery_mask,
    refuse_one_class,
)
from pipelines.embedding.folder import EmbeddingsFolder
from pipelines.evaluate.metrics.all_pairs import compare_all_pairs
from pipelines.evaluate.metrics.identification import NormalizedRows, identify
from pipelines.evaluate.metrics.roc import FARS, Floats, tar_name
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.storage.staging import lock_folder
from pipelines.storage.worker_pool import HERE, Workers


@dataclass(frozen=True)
class OwnImagesResult:
    """The figures of a user's images.

    Attributes:
        metrics: `rank1`, `rank5`, `chance`, `tar@far=...` of gallery-probe pairs, sizes, and
            `all/tar@far=...` of all pairs.
        skipped: names of figures that would take too much memory.
        roc: FAR and TAR of the gallery-probe pairs.
        protocol: which images are enrolled, in words.
    """

    metrics: dict[str, float]
    skipped: list[str]
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
    folder: str = "",
) -> OwnImagesResult | None:
    """Embed labelled images and look the probes up in the gallery; all ranks must call.

    Args:
        embed, topology, image_size, flip: see `embeddings.embed_images`.
        source: see `embeddings.embed_labelled`.
        all_pairs_fars: FARs for `all_pairs.compare_all_pairs`; none: all pairs are not compared.
        workers, folder: who compares, see `identification.identify`.

    Returns:
        The result on rank 0, None elsewhere.

    Raises:
        UserError: there is nothing to compare.
    """
    found = embed_labelled(embed, source, topology, image_size, flip)
    if found is None:
        return None
    refuse_one_class(source, found.labels[found.gallery])  # of shards, tars alone may know them
    index = ShardIndex.load(source) if index_exists(source) else None
    return _compare(found, describe_protocol(index, flip), all_pairs_fars, workers, folder)


def identify_embeddings(
    embedded: EmbeddingsFolder,
    all_pairs_fars: Sequence[float] = (),
    workers: Workers = HERE,
    folder: str = "",
) -> OwnImagesResult:
    """As `identify_own_images`, of rows that are there.

    Args:
        embedded: the rows.
        all_pairs_fars, workers, folder: see `identify_own_images`.

    Raises:
        UserError: there is nothing to compare.
    """
    labels = np.asarray(embedded.labels, np.int64)
    found = EmbeddedSet(embedded.rows, labels, gallery_mask(embedded.index, labels))
    refuse_one_class(embedded.path, labels[found.gallery])
    protocol = describe_protocol(embedded.index, embedded.recipe.flip)
    return _compare(found, protocol, all_pairs_fars, workers, folder)


@contextmanager
def comparison_folder(folder: str) -> Iterator[None]:
    """A folder for `identify_embeddings`, of this process alone; it stays if that is broken off.

    Raises:
        UserError: another process compares in it.
    """
    lock = lock_folder(Path(folder), folder)
    try:
        yield
        shutil.rmtree(folder)
    finally:
        if lock is not None:
            os.close(lock)


def _compare(
    found: EmbeddedSet,
    protocol: str,
    all_pairs_fars: Sequence[float],
    workers: Workers,
    folder: str,
) -> OwnImagesResult:
    rows, labels = found.embeddings, found.labels
    gallery, probes = np.flatnonzero(found.gallery), np.flatnonzero(~found.gallery)
    sides = [(NormalizedRows(rows, each), labels[each]) for each in (gallery, probes)]
    result = identify(*sides[0], *sides[1], workers=workers, folder=folder)
    metrics = {f"rank{k}": result.rank(k) for k in (1, 5)} | {"chance": result.chance(1)}
    metrics |= {tar_name(far): result.roc.tar(far) for far in FARS if result.roc.holds(far)}
    skipped = [tar_name(far) for far in FARS if not result.roc.holds(far)]
    metrics |= {"gallery": float(len(gallery)), "probes": float(len(probes))}
    if all_pairs_fars:
        every = compare_all_pairs(rows, labels, all_pairs_fars, workers, folder=folder)
        metrics |= {f"all/{tar_name(far)}": tar for far, tar in every.tar.items()}
        metrics |= {"genuine": float(every.genuine), "impostors": float(every.impostors)}
        skipped += [f"all/{tar_name(far)}" for far in every.skipped_fars]
    return OwnImagesResult(metrics, skipped, result.roc.curve(0.1), protocol)
