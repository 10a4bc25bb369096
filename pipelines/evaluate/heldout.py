"""The evaluation of a run: unseen classes, verified 1:1 and identified 1:N."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from mhe_dist.config import Config
from mhe_dist.errors import UserError
from mhe_dist.topology import Topology
from pipelines.evaluate.embeddings import Embed, EmbeddedSet, embed_set, normalised
from pipelines.evaluate.identification import Comparison, compare
from pipelines.evaluate.pairs import draw_pairs, squared_distances
from pipelines.evaluate.scores import FARS, far_name
from pipelines.evaluate.verification import accuracy
from pipelines.shards import ShardIndex

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
    not exceed the target), and the sizes `probes`, `gallery`, `pairs`, `impostors`.

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
            result = _score(found, config)
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


def _score(found: EmbeddedSet, config: Config) -> Evaluation:
    rows = normalised(found.embeddings)
    pairs = draw_pairs(found.labels, config.evaluate.pairs, config.run.seed)
    folds = accuracy(squared_distances(rows, pairs), pairs.same)
    gallery, probes = np.flatnonzero(found.gallery), np.flatnonzero(~found.gallery)
    result = compare(rows[gallery], found.labels[gallery], rows[probes], found.labels[probes])
    metrics = {f"rank{k}": result.rank(k) for k in RANKS}
    metrics |= {"chance": result.chance(1), "accuracy": folds.mean, "accuracy_std": folds.std}
    metrics |= {far_name(far): result.pairs.tar(far) for far in FARS}
    sizes = {"probes": probes, "gallery": gallery, "pairs": pairs.same}
    metrics |= {name: float(len(numbers)) for name, numbers in sizes.items()}
    metrics["impostors"] = float(result.pairs.impostors)
    far, tar = result.pairs.curve(0.1)
    roc = {"far": far, "tar": tar}
    return Evaluation(metrics, roc | _neighbours(result, found.labels, gallery, probes))


def _neighbours(
    result: Comparison,
    labels: npt.NDArray[np.int64],
    gallery: npt.NDArray[np.int64],
    probes: npt.NDArray[np.int64],
) -> dict[str, npt.NDArray[Any]]:
    nearest = gallery[result.nearest]
    right = labels[nearest] == labels[probes][:, None]
    return {"probes": probes, "nearest": nearest, "right": right}
