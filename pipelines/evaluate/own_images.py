"""A user's own images, identified 1:N, and compared all with all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhe_dist.distributed.topology import Topology
from pipelines.evaluate.embeddings import Embed, embed_labelled, normalised
from pipelines.evaluate.metrics.all_pairs import compare_all
from pipelines.evaluate.metrics.identification import compare
from pipelines.evaluate.metrics.roc import FARS, Floats, far_name


@dataclass(frozen=True)
class OwnImages:
    """What was found on a user's images.

    Attributes:
        metrics: `rank1`, `rank5`, `chance`, `tar@far=...` of gallery-probe pairs, sizes, and
            `all/tar@far=...` of all pairs.
        beyond: FARs of all pairs that were asked for and would take too much memory.
        roc: FAR and TAR of the gallery-probe pairs.
    """

    metrics: dict[str, float]
    beyond: list[float]
    roc: tuple[Floats, Floats]


def evaluate(
    embed: Embed,
    source: str,
    topology: Topology,
    side: int,
    flip: bool = True,
    all_pairs_fars: Sequence[float] = (),
) -> OwnImages | None:
    """Embed labelled images, look the probes up in the gallery; all ranks must call.

    Args:
        embed, topology, side, flip: see `embeddings.embed_images`.
        source: see `embeddings.embed_labelled`.
        all_pairs_fars: FARs for `all_pairs.compare_all`.

    Returns:
        The result on rank 0, None elsewhere.

    Raises:
        UserError: there is nothing to compare.
    """
    found = embed_labelled(embed, source, topology, side, flip)
    if found is None:
        return None
    rows, labels, gallery = normalised(found.embeddings), found.labels, found.gallery
    result = compare(rows[gallery], labels[gallery], rows[~gallery], labels[~gallery])
    metrics = {f"rank{k}": result.rank(k) for k in (1, 5)} | {"chance": result.chance(1)}
    metrics |= {far_name(far): result.pairs.tar(far) for far in FARS}
    metrics |= {"gallery": float(gallery.sum()), "probes": float((~gallery).sum())}
    beyond: list[float] = []
    if all_pairs_fars:
        every = compare_all(rows, labels, all_pairs_fars)
        metrics |= {f"all/{far_name(far)}": tar for far, tar in every.tar.items()}
        metrics |= {"genuine": float(every.genuine), "impostors": float(every.impostors)}
        beyond = every.beyond
    return OwnImages(metrics, beyond, result.pairs.curve(0.1))
