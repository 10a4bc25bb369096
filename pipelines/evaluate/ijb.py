"""IJB-B and IJB-C: templates verified 1:1 and identified 1:N (docs/formats.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.evaluate.embeddings import Embed, embed_images
from pipelines.evaluate.metrics.identification import compare
from pipelines.evaluate.metrics.roc import Collector, Floats, Ints, PairScores, far_name
from pipelines.evaluate.metrics.templates import dots, pool
from pipelines.evaluate.sets.ijb_files import Ijb

FARS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANKS: Final = (1, 5, 10)
FPIRS: Final = (1e-2, 1e-1)


@dataclass(frozen=True)
class IjbResult:
    """What was found.

    Attributes:
        images, templates, genuine, impostors: sizes; the last two of pairs of templates.
        tar: FAR -> TAR at the lowest threshold whose FAR does not exceed it.
        nearest: FAR -> TAR at the point of the ROC that is nearest to it, as published figures
            are read, and the FAR of that point.
        rank: k -> share of the enrolled probes whose subject is among the k best, mean of the two
            galleries; empty without the 1:N tables.
        tpir: FPIR -> TPIR (`Comparison.tpir`), mean of the two galleries.
        roc: FAR and TAR (strict).
    """

    images: int
    templates: int
    genuine: int
    impostors: int
    tar: dict[float, float]
    nearest: dict[float, tuple[float, float]]
    rank: dict[int, float]
    tpir: dict[float, float]
    roc: tuple[Floats, Floats]

    def flat(self) -> dict[str, float]:
        """Every figure under a name of its own."""
        figures = {far_name(far): value for far, value in self.tar.items()}
        figures |= {f"{far_name(far)}_nearest": value for far, (value, _) in self.nearest.items()}
        figures |= {f"rank{k}": value for k, value in self.rank.items()}
        return figures | {
            far_name(fpir).replace("tar@far", "tpir@fpir"): value
            for fpir, value in self.tpir.items()
        }

    def plain(self) -> dict[str, Any]:
        """The figures and sizes as JSON holds them."""
        sizes = ("images", "templates", "genuine", "impostors")
        return {name: getattr(self, name) for name in sizes} | self.flat()


def evaluate(embed: Embed, found: Ijb, topology: Topology, side: int) -> IjbResult | None:
    """Embed all faces and their mirror images, pool, compare; all ranks must call.

    Memory of rank 0: the embeddings (float32) and a fifth of the impostors' scores; the pairs are
    read and scored piece by piece.

    Returns:
        The result on rank 0, None elsewhere.
    """
    rows = embed_images(embed, found, topology, side, flip=True)
    if rows is None:
        return None
    return score(found, *pool(rows, found.scores, found.templates, found.media))


def score(found: Ijb, ids: Ints, rows: Floats) -> IjbResult:
    """The figures from the rows of all templates; see `templates.pool`.

    Raises:
        UserError: a protocol names a template that has no image.
    """
    pairs = verify(found, ids, rows)
    rank: dict[int, float] = {}
    tpir: dict[float, float] = {}
    if found.has_identification:
        probes, subjects = found.probes()
        probe_rows = rows[_places(ids, probes)]
        results = [
            compare(rows[_places(ids, templates)], names, probe_rows, subjects, 1, 0.0)
            for templates, names in found.galleries()
        ]
        rank = {k: float(np.mean([each.rank(k) for each in results])) for k in RANKS}
        tpir = {f: float(np.mean([each.tpir(f) for each in results])) for f in FPIRS}
    return IjbResult(
        *(found.count, len(ids), len(pairs.genuine), pairs.impostors),
        {far: pairs.tar(far) for far in FARS},
        {far: pairs.nearest_tar(far) for far in FARS},
        *(rank, tpir, pairs.curve(FARS[-1])),
    )


def verify(found: Ijb, ids: Ints, rows: Floats) -> PairScores:
    """The scores of the 1:1 protocol, which is read twice: to count, and to compare."""
    impostors = sum(int((~same).sum()) for _, _, same in found.pairs())
    # Twice the largest FAR: so the nearest point of the ROC is always among what is kept.
    kept = Collector(impostors, min(1.0, 2 * FARS[-1]))
    for first, second, same in found.pairs():
        kept.add(dots(rows, _places(ids, first), _places(ids, second)), same)
    return kept.scores()


def _places(ids: Ints, wanted: Ints) -> Ints:
    """Numbers of templates by their ids."""
    places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if (missing := wanted[ids[places] != wanted]).size:
        raise UserError(f"template {missing[0]} is in a protocol, but no image is of it")
    return places
