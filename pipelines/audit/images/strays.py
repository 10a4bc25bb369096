"""Images that are not of their class: they belong to another one, or to none."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import Floats
from pipelines.audit.classes.pairs import gather_some, some_used
from pipelines.audit.images.scores import ImageScores
from pipelines.audit.separation import Separation, part_in_two, separate
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, UnitRows
from pipelines.clustering.state import ClusterState

RIGHT, WRONG_LABEL, FOREIGN = 0, 1, 2  # of an image

_PART: Final = 1 << 18  # images that are looked at together
_FITTED: Final = 1 << 21  # images that thresholds are found on, at most
_TESTED: Final = 256  # images that are compared with images of two classes together
_NEAREST: Final = 3  # images of a class that are nearest to it and count


class Nearness(NamedTuple):
    """Of some images the nearest classes, where classes that are one count as one.

    Attributes:
        own: float64 `[n]`, cosine to their own class; NaN: no other image is in it.
        other: float64 `[n]`, cosine to the nearest other class; NaN: none was found.
        neighbour: int64 `[n]`, that class.
        drawn: float64 `[n]`, cosine to a class that was drawn.
    """

    own: Floats
    other: Floats
    neighbour: Ints
    drawn: Floats

    @property
    def doubt(self) -> Floats:
        """float64 `[n]`: how much nearer the other class is than their own."""
        return self.other - self.own

    @property
    def best(self) -> Floats:
        """float64 `[n]`: cosine to the nearest class of all."""
        return np.fmax(self.own, self.other)


class Strays(NamedTuple):
    """Files of what was found out about each image, and how.

    Attributes:
        kind: uint8 `[N]`, `RIGHT`, `WRONG_LABEL` or `FOREIGN`.
        neighbour: int32 `[N]`, the nearest other class.
        probability: float32 `[N]`, that `kind` is right.
        separation: how doubted images were told from others, by `Nearness.doubt`.
        parting: how those of another class were told from those of none, by `Nearness.best`.
    """

    kind: npt.NDArray[Any]
    neighbour: npt.NDArray[Any]
    probability: npt.NDArray[Any]
    separation: Separation
    parting: Separation


def read_nearness(
    scores: ImageScores, labels: npt.NDArray[Any], ids: Ints, images: slice | Ints
) -> Nearness:
    """The nearest classes of some images.

    Args:
        scores: of all images.
        labels: int32 `[N]`.
        ids: int64 `[C]`, the class that each class is merged into.
        images: which.
    """
    mine, others = np.asarray(labels[images]), np.asarray(scores.others[images])
    cosines = np.asarray(scores.cosines[images]).astype(np.float64)
    merged = np.where(others >= 0, ids[others], -1)
    same = (merged == ids[mine][:, None]) & (mine >= 0)[:, None]
    own = np.asarray(scores.own[images]).astype(np.float64)
    own = np.fmax(own, np.where(same, cosines, -np.inf).max(axis=1))
    own[np.isneginf(own)] = np.nan
    usable = ~same & (merged >= 0)
    first = usable.argmax(axis=1)
    rows, there = np.arange(len(first)), usable.any(axis=1)
    other = np.where(there, cosines[rows, first], np.nan)
    neighbour = np.where(there, others[rows, first], -1).astype(np.int64)
    return Nearness(own, other, neighbour, np.asarray(scores.drawn[images]).astype(np.float64))


def find_strays(
    rows: UnitRows,
    scores: ImageScores,
    labels: npt.NDArray[Any],
    members: Members,
    used: npt.NDArray[Any],
    ids: Ints,
    settings: AuditSettings,
    state: ClusterState,
) -> Strays:
    """Tell wrong labels and foreign images from the others.

    What they look like is known. An image under a wrong label is nearer to its class than to one
    that is drawn. A foreign image is as near to the nearest class as any image is to the nearest
    one beside its own, and its own is as one that is drawn.

    Args:
        rows: of all images.
        scores, labels, ids: see `read_nearness`.
        members: images of each class.
        used: uint8 `[N]`, whether an image is one that its class's centre is made of.
        settings: the false rate.
        state: gets the files.
    """
    step = max(1, rows.count // _FITTED)
    known = read_nearness(scores, labels, ids, np.arange(0, rows.count, step))
    made = [known.best - known.drawn, known.other - known.drawn]
    separation = separate(known.doubt, made, settings.false_rate)
    accused = known.doubt >= max(separation.threshold, 0.0)
    parting = part_in_two(known.best[accused], known.best, known.other)
    kind = state.array("kind", (rows.count,), "uint8")
    neighbour = state.array("neighbour", (rows.count,), "int32")
    probability = state.array("probability", (rows.count,), "float32")

    def _decide(piece: int) -> None:
        here = slice(piece * _PART, min((piece + 1) * _PART, rows.count))
        near = read_nearness(scores, labels, ids, here)
        doubted = near.doubt >= max(separation.threshold, 0.0)
        wrong = separation.probability(near.doubt).sum(axis=0)
        of_other = parting.probability(near.best)[0]
        found = np.where(doubted, np.where(of_other >= 0.5, WRONG_LABEL, FOREIGN), RIGHT)
        relabelled = np.flatnonzero(found == WRONG_LABEL)
        pair = np.asarray(labels[here])[relabelled].astype(np.int64), near.neighbour[relabelled]
        nearer = is_nearer(rows, members, used, here.start + relabelled, *pair)
        found[relabelled[~nearer]] = RIGHT
        chance = np.where(found == WRONG_LABEL, wrong * of_other, wrong * (1 - of_other))
        kind[here], neighbour[here] = found, near.neighbour
        probability[here] = np.where(found == RIGHT, 0, chance)

    state.run("strays", -(-rows.count // _PART), _decide)
    return Strays(kind, neighbour, probability, separation, parting)


def is_nearer(
    rows: UnitRows,
    members: Members,
    used: npt.NDArray[Any],
    images: Ints,
    own: Ints,
    other: Ints,
) -> npt.NDArray[np.bool_]:
    """bool `[n]`: whether three images of another class are nearer than any three of its own.

    Args:
        rows: of all images.
        members: images of each class.
        used: uint8 `[N]`, see `find_strays`.
        images: int64 `[n]`.
        own, other: int64 `[n]`, classes.
    """
    found = np.zeros(len(images), bool)
    for start in range(0, len(images), _TESTED):
        here = slice(start, start + _TESTED)
        vectors = rows.gather(images[here])
        near = [
            _nearest_images(rows, some_used(members, used, each[here]), images[here], vectors)
            for each in (own, other)
        ]
        found[here] = near[1] > near[0]
    return found


def _nearest_images(rows: UnitRows, compared: Ints, images: Ints, vectors: Any) -> Floats:
    """float64 `[n]`: mean cosine of the three nearest of images `[n, K]`, without the image."""
    there = (compared >= 0) & (compared != images[:, None])
    others = gather_some(rows, np.where(there, compared, -1))
    cosines = np.einsum("nd,nkd->nk", vectors, others).astype(np.float64)
    cosines[~there] = -1.0
    best = -np.sort(-cosines, axis=1)[:, :_NEAREST]
    count = np.clip(there.sum(axis=1), 1, _NEAREST)
    valid = np.arange(best.shape[1]) < count[:, None]
    found: Floats = (best * valid).sum(axis=1) / count
    return found
