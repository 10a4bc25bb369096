"""The evaluation of a run: unseen classes, verified 1:1 and identified 1:N."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.evaluate.embeddings import Embed, EmbeddedSet, embed_set, normalised
from pipelines.evaluate.metrics.identification import Comparison, compare
from pipelines.evaluate.metrics.pair_sampling import draw_pairs, squared_distances
from pipelines.evaluate.metrics.roc import FARS, far_name
from pipelines.evaluate.metrics.verification import accuracy
from pipelines.shards.index import ShardIndex

RANKS: Final = (1, 5)


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        metrics: name -> value, on every rank.
        details: arrays for pictures, on rank 0 (empty elsewhere): `far`, `tar` of the ROC;
            `probes` `[P]`, `nearest` `[P, k]` sample numbers in the set, `right` bool `[P, k]`.
    """

    metrics: dict[str, float]
    details: dict[str, npt.NDArray[Any]]

    def save(self, path: str | Path) -> None:
        """Write the details as NumPy's `.npz`."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **self.details)  # type: ignore[arg-type]


def evaluate(embed: Embed, config: Config, topology: Topology) -> dict[str, float]:
    """The metrics of `run`; all ranks must call."""
    return run(embed, config, topology).metrics


def run(embed: Embed, config: Config, topology: Topology) -> Evaluation:
    """Evaluate on `config.evaluate.shards`; all ranks must call and all get the metrics.

    The metrics are `rank1`, `rank5` (share of probes whose class is among the k best of the
    gallery), `chance` (of rank1), `accuracy` and `accuracy_std` (ten folds of drawn pairs),
    `tar@far=1e-2` and so on (all pairs of gallery and probe, at the lowest threshold whose FAR does
    not exceed the target), and the sizes `probes`, `gallery`, `pairs`, `impostors`. For each name
    in `config.evaluate.typefaces` there are `name/rank1`, `name/tar@far=1e-2` and so on,
    `name/probes`: those of its typefaces against the whole gallery.

    Args:
        embed: see `embeddings.Embed`.
        config: of the run; `evaluate`, `data.image_size` and `run.seed` are looked at.
        topology: the ranks.

    Raises:
        UserError: there is no such set, or it is too small to evaluate on.
    """
    index = ShardIndex.load(config.evaluate.shards)
    found = embed_set(embed, index, topology, config.data.image_size, config.evaluate.flip)
    result, message = Evaluation({}, {}), ""
    if found is not None:
        try:
            result = _score(found, config, index)
        except UserError as error:
            # Told to the others, who would wait for the metrics until their timeout.
            message = f"{config.evaluate.shards}: {error}"
    metrics, message = from_first((result.metrics, message), topology)
    if message:
        raise UserError(message)
    return Evaluation(metrics, result.details)


def from_first(value: Any, topology: Topology) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0, group=topology.host_group)
    return box[0]


def _score(found: EmbeddedSet, config: Config, index: ShardIndex) -> Evaluation:
    rows = normalised(found.embeddings)
    pairs = draw_pairs(found.labels, config.evaluate.pairs, config.run.seed)
    folds = accuracy(squared_distances(rows, pairs), pairs.same)
    gallery, probes = np.flatnonzero(found.gallery), np.flatnonzero(~found.gallery)
    result = compare(rows[gallery], found.labels[gallery], rows[probes], found.labels[probes])
    metrics = _figures(result)
    metrics |= {"chance": result.chance(1), "accuracy": folds.mean, "accuracy_std": folds.std}
    sizes = {"probes": probes, "gallery": gallery, "pairs": pairs.same}
    metrics |= {name: float(len(numbers)) for name, numbers in sizes.items()}
    metrics["impostors"] = float(result.pairs.impostors)
    for name, some in _of_typefaces(config.evaluate.typefaces, index, probes):
        part = compare(rows[gallery], found.labels[gallery], rows[some], found.labels[some])
        metrics |= {f"{name}/{key}": value for key, value in _figures(part).items()}
        metrics[f"{name}/probes"] = float(len(some))
    far, tar = result.pairs.curve(0.1)
    roc = {"far": far, "tar": tar}
    return Evaluation(metrics, roc | _neighbours(result, found.labels, gallery, probes))


def _figures(result: Comparison) -> dict[str, float]:
    ranks = {f"rank{k}": result.rank(k) for k in RANKS}
    return ranks | {far_name(far): result.pairs.tar(far) for far in FARS}


def _of_typefaces(
    patterns: dict[str, str], index: ShardIndex, probes: npt.NDArray[np.int64]
) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """For each name, the probes in the typefaces of its pattern.

    Raises:
        UserError: the set does not say its typefaces, or no probe is in one of a pattern.
    """
    if not patterns:
        return
    if "fonts" not in index.meta:
        raise UserError(
            "evaluate.typefaces: only sets of `mhe data glyphs` say which typeface an image is in"
        )
    fonts, font = index.meta["fonts"], np.asarray(index.meta["font"], np.int64)[probes]
    for name, pattern in patterns.items():
        wanted = [n for n, file in enumerate(fonts) if fnmatch(file.partition("#")[0], pattern)]
        some = probes[np.isin(font, wanted)]
        if not len(some):
            known = ", ".join(fonts[n] for n in np.unique(font))
            raise UserError(
                f"evaluate.typefaces.{name}={pattern}: no probe is in such a typeface; "
                f"there are {known}"
            )
        yield name, some


def _neighbours(
    result: Comparison,
    labels: npt.NDArray[np.int64],
    gallery: npt.NDArray[np.int64],
    probes: npt.NDArray[np.int64],
) -> dict[str, npt.NDArray[Any]]:
    nearest = gallery[result.nearest]
    right = labels[nearest] == labels[probes][:, None]
    return {"probes": probes, "nearest": nearest, "right": right}
