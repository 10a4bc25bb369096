"""IJB-B and IJB-C: templates verified 1:1 and identified 1:N (docs/formats.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mhe_dist.distributed.topology import Topology
from pipelines.embedding.embeddings import Embed, embed_images
from pipelines.evaluate.metrics.identification import identify
from pipelines.evaluate.metrics.roc import Floats, Ints, Roc, RocCollector, tar_name
from pipelines.evaluate.metrics.templates import pool_templates, template_scores
from pipelines.evaluate.sets.ijb_files import IjbSet
from pipelines.storage.worker_pool import HERE, Workers

FARS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANKS: Final = (1, 5, 10)
FPIRS: Final = (1e-2, 1e-1)


@dataclass(frozen=True)
class IjbResult:
    """The figures of both protocols.

    Attributes:
        images, templates, genuine, impostors: sizes; the last two of pairs of templates.
        tar: FAR -> TAR at the lowest threshold whose FAR does not exceed it.
        nearest: FAR -> TAR at the point of the ROC whose FAR is nearest to it, as published
            figures are read, and the FAR of that point.
        rank: k -> share of the enrolled probes whose subject is among the k best, mean of the two
            galleries; empty without the 1:N tables.
        tpir: FPIR -> TPIR (`Identification.tpir`), mean of the two galleries.
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

    def named_metrics(self) -> dict[str, float]:
        """Every figure under a name of its own, as trackers take it."""
        figures = {tar_name(far): value for far, value in self.tar.items()}
        figures |= {f"{tar_name(far)}_nearest": value for far, (value, _) in self.nearest.items()}
        figures |= {f"rank{k}": value for k, value in self.rank.items()}
        return figures | {
            tar_name(fpir).replace("tar@far", "tpir@fpir"): value
            for fpir, value in self.tpir.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The figures and sizes as JSON can hold them."""
        sizes = ("images", "templates", "genuine", "impostors")
        return {name: getattr(self, name) for name in sizes} | self.named_metrics()


def evaluate_ijb(
    embed: Embed,
    ijb: IjbSet,
    topology: Topology,
    image_size: int,
    workers: Workers = HERE,
    folder: str = "",
) -> IjbResult | None:
    """Embed all faces and their mirror images, pool to templates, compare; all ranks must call.

    Memory of rank 0: the embeddings (float32) and a fifth of the impostors' scores; the pairs are
    read and scored piece by piece.

    Args:
        embed, topology, image_size: see `embeddings.embed_images`.
        ijb: the set.
        workers, folder: who identifies, see `identification.identify`.

    Returns:
        The result on rank 0, None elsewhere.
    """
    rows = embed_images(embed, ijb, topology, image_size, flip=True)
    if rows is None:
        return None
    ids, pooled = pool_templates(rows, ijb.scores, ijb.templates, ijb.media)
    return evaluate_templates(ijb, ids, pooled, workers, folder)


def evaluate_templates(
    ijb: IjbSet, ids: Ints, rows: Floats, workers: Workers = HERE, folder: str = ""
) -> IjbResult:
    """Compute the figures from the rows of all templates (`templates.pool_templates`).

    Raises:
        UserError: a protocol names a template that has no image.
    """
    roc = verify_templates(ijb, ids, rows)
    rank: dict[int, float] = {}
    tpir: dict[float, float] = {}
    if ijb.has_identification:
        probes, subjects = ijb.probes()
        probe_rows = rows[_row_numbers(ids, probes)]
        results = [
            identify(gallery, names, probe_rows, subjects, 1, 0.0, workers, folder)
            for gallery, names in (
                (rows[_row_numbers(ids, templates)], names) for templates, names in ijb.galleries()
            )
        ]
        rank = {k: float(np.mean([each.rank(k) for each in results])) for k in RANKS}
        tpir = {f: float(np.mean([each.tpir(f) for each in results])) for f in FPIRS}
    return IjbResult(
        images=ijb.count,
        templates=len(ids),
        genuine=len(roc.genuine),
        impostors=roc.impostors,
        tar={far: roc.tar(far) for far in FARS},
        nearest={far: roc.nearest_tar(far) for far in FARS},
        rank=rank,
        tpir=tpir,
        roc=roc.curve(FARS[-1]),
    )


def verify_templates(ijb: IjbSet, ids: Ints, rows: Floats) -> Roc:
    """The ROC of the 1:1 protocol. Its pairs are read twice: to count, and to compare them."""
    impostors = sum(int((~same).sum()) for _, _, same in ijb.pairs())
    # Twice the largest FAR, so that the nearest point of the ROC is always among what is kept.
    collector = RocCollector(impostors, min(1.0, 2 * FARS[-1]))
    for first, second, same in ijb.pairs():
        scores = template_scores(rows, _row_numbers(ids, first), _row_numbers(ids, second))
        collector.add(scores, same)
    return collector.roc()


def _row_numbers(ids: Ints, templates: Ints) -> Ints:
    """Positions of templates in `ids`, which rises; `IjbSet` yields none that is not there."""
    return np.searchsorted(ids, templates)
