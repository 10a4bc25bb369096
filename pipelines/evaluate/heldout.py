"""Evaluation on held-out classes: verification 1:1 and identification 1:N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.collectives import broadcast_from_first
from mhe_dist.distributed.failures import failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import (
    Embed,
    EmbeddedSet,
    describe_protocol,
    embed_set,
    gallery_mask,
    normalize_embeddings,
)
from pipelines.evaluate.metrics.hard_cases import IdentifiedSet, find_hard_cases
from pipelines.evaluate.metrics.identification import Identification, identify
from pipelines.evaluate.metrics.pair_sampling import draw_pairs, squared_distances
from pipelines.evaluate.metrics.projection import map_embeddings
from pipelines.evaluate.metrics.roc import FARS, tar_name
from pipelines.evaluate.metrics.verification import FOLDS, ten_fold_accuracy
from pipelines.shards.index import ShardIndex
from pipelines.storage.urls import atomic_write
from pipelines.storage.worker_pool import HERE, Workers

RANKS: Final = (1, 5)


class Evaluation(NamedTuple):
    """The results of an evaluation.

    Attributes:
        metrics: name -> value, on every rank.
        details: arrays for plots, on rank 0 (empty elsewhere): `far`, `tar` of the ROC;
            `probes` `[P]`, `nearest` `[P, k]` sample numbers in the set, `right` bool `[P, k]`:
            whether a neighbour is of the probe's class; and, if they were asked for, those of
            `hard_cases.find_hard_cases` and `projection.map_embeddings`.
        protocol: which images are enrolled, in words; on every rank.
    """

    metrics: dict[str, float]
    details: dict[str, npt.NDArray[Any]]
    protocol: str = ""

    def save(self, url: str | Path) -> None:
        """Write the details as NumPy's `.npz`, to a path or URL."""
        with atomic_write(str(url)) as stream:
            np.savez_compressed(stream, **self.details)  # type: ignore[arg-type]


def evaluate_heldout(
    embed: Embed,
    settings: EvaluateConfig,
    image_size: int,
    seed: int,
    topology: Topology,
    with_pictures: bool = False,
    workers: Workers = HERE,
    folder: str = "",
) -> Evaluation:
    """Evaluate on the shards `settings.shards`; all ranks must call, and all get the metrics.

    The metrics are `rank1`, `rank5` (share of probes whose class is among the k best of the
    gallery), `chance` (of rank1), `accuracy` and `accuracy_std` (ten folds of drawn pairs),
    `tar@far=1e-2` and so on (all pairs of gallery and probe, at the lowest threshold whose FAR does
    not exceed the target; of very many pairs without the large FARs), and the sizes `probes`,
    `gallery`, `pairs`, `impostors`. For each name in `settings.typefaces` there are `name/rank1`,
    `name/tar@far=1e-2` and so on, and `name/probes`: the figures of the probes in its typefaces
    against the whole gallery.

    Args:
        embed: see `embeddings.Embed`.
        settings: `evaluate` of the config.
        image_size: of the images in pixels.
        seed: of the drawn pairs.
        topology: the ranks.
        with_pictures: also find what a report shows of the set: hard cases and a map. An evaluation
            in mid-training needs neither.
        workers, folder: who compares, see `identification.identify`.

    Raises:
        UserError: there is no such set, or it is too small to evaluate on.
    """
    with failing_together(topology):
        index = ShardIndex.load(settings.shards)
    embedded = embed_set(embed, index, topology, image_size, settings.flip)
    result = Evaluation({}, {})
    with failing_together(topology):
        if embedded is not None:
            identify_rows = partial(identify, workers=workers, folder=folder)
            try:
                result = _evaluate_embedded(
                    embedded, settings, seed, index, identify_rows, with_pictures
                )
            except UserError as error:
                raise UserError(f"{settings.shards}: {error}") from error
    metrics = broadcast_from_first(result.metrics, topology)
    return Evaluation(metrics, result.details, describe_protocol(index, settings.flip))


def heldout_figure_names(settings: EvaluateConfig) -> list[str]:
    """What `evaluate_heldout` may call its metrics."""
    found = [*(f"rank{k}" for k in RANKS), *map(tar_name, FARS)]
    sizes = ["probes", "gallery", "pairs", "impostors"]
    parts = [f"{name}/{key}" for name in settings.typefaces for key in (*found, "probes")]
    return [*found, "accuracy", "accuracy_std", "chance", *sizes, *parts]


def refuse_unusable_set(settings: EvaluateConfig, seed: int) -> None:
    """Refuse held-out shards from which no figure could be computed; reads their index alone.

    Raises:
        UserError: there are no genuine pairs or no others, or a typeface has no probe.
    """
    index = ShardIndex.load(settings.shards)
    parts = [shard.labels for shard in index.shards]
    if any(part is None for part in parts):  # then only the tars know
        return
    labels = np.concatenate([np.empty(0, np.int64), *(part for part in parts if part is not None)])
    gallery = gallery_mask(index, labels)
    enrolled, probes = labels[gallery], np.flatnonzero(~gallery)
    name = f"evaluate.shards={settings.shards}"
    if not len(enrolled) or not len(probes):
        raise UserError(
            f"{name}: {len(enrolled)} gallery entries, {len(probes)} probes: no class has two "
            "images, one to enrol and one to find"
        )
    if not np.isin(labels[probes], enrolled).any():
        raise UserError(f"{name}: no probe is of a class that is enrolled: there is none to find")
    pairs = len(draw_pairs(labels, settings.pairs, seed).same)
    if pairs < FOLDS:
        raise UserError(
            f"{name}: {len(labels)} images of {len(np.unique(labels))} classes make {pairs} pairs "
            f"of the same and of two classes (evaluate.pairs={settings.pairs}), too few for "
            f"{FOLDS} folds"
        )
    for _ in _probes_by_typeface(settings.typefaces, index, probes):
        pass


def _evaluate_embedded(
    embedded: EmbeddedSet,
    settings: EvaluateConfig,
    seed: int,
    index: ShardIndex,
    identify_rows: Callable[..., Identification],
    with_pictures: bool,
) -> Evaluation:
    rows, labels = normalize_embeddings(embedded.embeddings), embedded.labels
    pairs = draw_pairs(labels, settings.pairs, seed)
    folds = ten_fold_accuracy(squared_distances(rows, pairs), pairs.same)
    gallery, probes = np.flatnonzero(embedded.gallery), np.flatnonzero(~embedded.gallery)
    result = identify_rows(rows[gallery], labels[gallery], rows[probes], labels[probes])
    metrics = _identification_metrics(result)
    metrics |= {"chance": result.chance(1), "accuracy": folds.mean, "accuracy_std": folds.std}
    sizes = {"probes": probes, "gallery": gallery, "pairs": pairs.same}
    metrics |= {name: float(len(numbers)) for name, numbers in sizes.items()}
    metrics["impostors"] = float(result.roc.impostors)
    for name, chosen in _probes_by_typeface(settings.typefaces, index, probes):
        part = identify_rows(rows[gallery], labels[gallery], rows[chosen], labels[chosen])
        metrics |= {f"{name}/{key}": value for key, value in _identification_metrics(part).items()}
        metrics[f"{name}/probes"] = float(len(chosen))
    far, tar = result.roc.curve(0.1)
    details = {"far": far, "tar": tar} | _neighbours(result, labels, gallery, probes)
    if with_pictures:
        details |= find_hard_cases(IdentifiedSet(rows, labels, gallery, probes, result))
        details |= map_embeddings(rows, labels, seed)
    return Evaluation(metrics, details)


def _identification_metrics(result: Identification) -> dict[str, float]:
    ranks = {f"rank{k}": result.rank(k) for k in RANKS}
    return ranks | {tar_name(far): result.roc.tar(far) for far in FARS if result.roc.holds(far)}


def _probes_by_typeface(
    patterns: dict[str, str], index: ShardIndex, probes: npt.NDArray[np.int64]
) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield each name, and the probes in the typefaces that match its pattern.

    Raises:
        UserError: the set does not name its typefaces, or no probe matches a pattern.
    """
    if not patterns:
        return
    if "fonts" not in index.meta:
        raise UserError(
            "evaluate.typefaces: only sets of `mhe data glyphs` say which typeface an image is in"
        )
    fonts, font = index.meta["fonts"], np.asarray(index.meta["font"], np.int64)[probes]
    for name, pattern in patterns.items():
        matching = [n for n, file in enumerate(fonts) if fnmatch(file.partition("#")[0], pattern)]
        chosen = probes[np.isin(font, matching)]
        if not len(chosen):
            known = ", ".join(fonts[n] for n in np.unique(font))
            raise UserError(
                f"evaluate.typefaces.{name}={pattern}: no probe is in such a typeface; "
                f"there are {known}"
            )
        yield name, chosen


def _neighbours(
    result: Identification,
    labels: npt.NDArray[np.int64],
    gallery: npt.NDArray[np.int64],
    probes: npt.NDArray[np.int64],
) -> dict[str, npt.NDArray[Any]]:
    nearest = gallery[result.nearest]
    right = labels[nearest] == labels[probes][:, None]
    return {"probes": probes, "nearest": nearest, "right": right}
