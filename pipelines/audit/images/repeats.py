"""Pictures that are there twice: in the training set, and in a set that it is evaluated on."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.audit.classes.centres import Floats
from pipelines.audit.images.pictures import compare_copies, compare_pictures
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints
from pipelines.clustering.state import ClusterState
from pipelines.shards.index import ShardIndex

CANDIDATE_COSINE: Final = 0.9  # of embeddings, from which pixels are compared
_PART: Final = 1 << 10  # pairs of pictures that are compared in a piece of work
_DRAWN: Final = 512  # pictures that are copied to see how alike copies are
_MISSED: Final = 0.05  # share of worse copies that are missed, at most


class CopyThreshold(NamedTuple):
    """From where on two pictures are copies.

    Attributes:
        likeness: see `compare_pixels`. Nearly all worse copies are as alike, and hardly any two
            pictures of classes that are next to one another.
        made: float64 `[n]`, how alike worse copies are.
    """

    likeness: float
    made: Floats

    def probability(self, likeness: Floats) -> Floats:
        """float64 `[n]`: 1 for equal pictures; else the share of copies that are no more alike."""
        share = np.searchsorted(self.made, likeness, side="right") / max(1, len(self.made))
        return np.where(likeness >= 1, 1.0, np.clip(share, 0, 1))


class PicturePairs(NamedTuple):
    """Pairs of pictures that may be copies.

    Attributes:
        images: int64 `[P]`, of the training set.
        neighbours: int64 `[P]`, of the training set, or of the other one.
        likeness: float64 `[P]`, see `compare_pixels`; NaN: it was not possible.
    """

    images: Ints
    neighbours: Ints
    likeness: Floats


def learn_copies(
    index: ShardIndex,
    others: npt.NDArray[Any],
    members: Members,
    side: int,
    settings: AuditSettings,
    state: ClusterState,
) -> CopyThreshold:
    """See how alike worse copies of some pictures are, and pictures of the classes next to theirs.

    Args:
        index: the data set.
        others: int32 `[N]`, the class next to each image's own; -1: none.
        members: images of each class.
        side: width and height at which pictures are compared, in pixels.
        settings: the false rate, and the seed.
        state: gets the figures.
    """

    def _learn() -> None:
        rng = generator(settings.seed, "audit/copies")
        drawn = sample_without_replacement(index.samples, min(_DRAWN, index.samples), rng)
        made = compare_copies(index, drawn, side)
        drawn = drawn[np.asarray(others)[drawn] >= 0]
        beside = members.some(np.asarray(others)[drawn].astype(np.int64), 1)[:, 0]
        there = beside >= 0
        different = compare_pictures((index, drawn[there]), (index, beside[there]), side)
        state.save_small("copies", made=made, different=different)

    state.once("copies", _learn)
    found = state.load_small("copies")
    made, different = (
        np.sort(found[name][~np.isnan(found[name])]) for name in ("made", "different")
    )
    likeness = [float(np.quantile(made, _MISSED))] if len(made) else [1.0]
    if len(different):
        likeness.append(float(np.quantile(different, 1 - settings.false_rate)))
    return CopyThreshold(max(likeness), made)


def repeated_pairs(neighbours: npt.NDArray[Any], cosines: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Images and an earlier one each that may be the same picture, each later image once.

    Args:
        neighbours: int64 `[N]`, the nearest image of each.
        cosines: float32 `[N]`, to it.
    """
    near = np.flatnonzero((np.asarray(neighbours) >= 0) & (cosines >= CANDIDATE_COSINE))
    other = np.asarray(neighbours)[near]
    later, earlier = np.maximum(near, other), np.minimum(near, other)
    order = np.lexsort((earlier, -np.asarray(cosines)[near], later))
    later, earlier = later[order], earlier[order]
    first = np.flatnonzero(np.diff(later, prepend=-1))
    return later[first], earlier[first]


def compare_pairs(
    one: tuple[ShardIndex, Ints],
    other: tuple[ShardIndex, Ints],
    side: int,
    name: str,
    state: ClusterState,
) -> PicturePairs:
    """Compare the pictures of pairs, part by part.

    Args:
        one, other: a data set, and int64 `[P]` images of it.
        side: width and height that they are compared at, in pixels.
        name: of the stage.
        state: gets the file.
    """
    images, neighbours = one[1], other[1]
    likeness = state.array(f"{name}_alike", (max(1, len(images)),), "float64")

    def _compare(piece: int) -> None:
        here = slice(piece * _PART, min((piece + 1) * _PART, len(images)))
        likeness[here] = compare_pictures(
            (one[0], images[here]), (other[0], neighbours[here]), side
        )

    state.run(f"{name}_alike", -(-len(images) // _PART), _compare)
    return PicturePairs(images, neighbours, np.asarray(likeness)[: len(images)].copy())
