"""Pictures that are there twice: in the training set, and in a set that it is evaluated on."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.audit.classes.centres import Floats
from pipelines.audit.images.pictures import EQUAL, compare_copies, compare_pictures
from pipelines.audit.separation import separate
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.rows import Ints
from pipelines.clustering.state import ClusterState
from pipelines.shards.index import ShardIndex

CANDIDATE_COSINE: Final = 0.9  # of embeddings, from which pixels are compared
_PART: Final = 1 << 10  # pairs of pictures that are compared in a piece of work
_DRAWN: Final = 512  # pictures that are copied to see how similar copies are


class ToldCopies(NamedTuple):
    """Which pairs of pictures are copies.

    Attributes:
        are_copies: bool `[P]`.
        probability: float64 `[P]`; 1 of pictures whose pixels are all equal.
        threshold: likeness from which they are; 1: only equal ones are.
    """

    are_copies: npt.NDArray[np.bool_]
    probability: Floats
    threshold: float


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
    index: ShardIndex, side: int, settings: AuditSettings, state: ClusterState
) -> Floats:
    """float64 `[m]`: how similar worse copies of some pictures are to them.

    Args:
        index: the data set.
        side: width and height at which pictures are compared, in pixels.
        settings: for the seed.
        state: gets the figures.
    """

    def _learn() -> None:
        rng = generator(settings.seed, "audit/copies")
        drawn = sample_without_replacement(index.samples, min(_DRAWN, index.samples), rng)
        state.save_small("copies", made=compare_copies(index, drawn, side))

    state.once("copies", _learn)
    return state.load_small("copies")["made"]


def tell_copies(likeness: Floats, made: Floats, false_rate: float) -> ToldCopies:
    """Tell pairs of pictures that are copies from those that are merely similar.

    Equal pictures are copies. Of the others those are that stand out as worse copies would; where
    different pictures are as similar as copies, such as glyphs of similar fonts, none does.

    Args:
        likeness: float64 `[P]`, of pairs; NaN: it is not known.
        made: float64 `[m]`, see `learn_copies`.
        false_rate: share of the pairs that may be taken for copies wrongly.
    """
    equal = likeness >= EQUAL
    separation = separate(np.where(equal, np.nan, likeness), [made], false_rate)
    probability = np.where(equal, 1.0, separation.probability(likeness)[0])
    threshold = min(separation.threshold, EQUAL)
    return ToldCopies(likeness >= threshold, probability, threshold)


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
