"""Images that are not of their class: they belong to another one, or to none."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import Floats, group_classes, segments_of
from pipelines.audit.classes.pairs import gather_some, some_used
from pipelines.audit.discriminant import Discriminant, learn_discriminant
from pipelines.audit.images.scores import ImageScores
from pipelines.audit.separation import Separation, part_in_two, separate
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, UnitRows
from pipelines.clustering.settings import chunk_rows
from pipelines.clustering.state import ClusterState

RIGHT, WRONG_LABEL, FOREIGN = 0, 1, 2  # of an image

_PART: Final = 1 << 18  # images that are looked at together
_FITTED: Final = 1 << 21  # images that thresholds are found on, at most
_STRANGERS: Final = 0.03  # share of those relabelled that may be of no class; others are dropped
_TESTED: Final = 256  # images that are compared with images of two classes together
_NEAREST: Final = 3  # images of a class that are nearest to it and count


class Nearness(NamedTuple):
    """Of some images the nearest classes, where classes that are one count as one.

    Attributes:
        own: float64 `[n]`, cosine to their own class; NaN: no other image is in it.
        own_class: int64 `[n]`, that class; -1: none.
        others: float64 `[n, 2]`, cosines to the nearest other classes; NaN: it was not found.
        neighbours: int64 `[n, 2]`, those classes; -1: none.
        drawn: float64 `[n]`, cosine to a class that was drawn.
    """

    own: Floats
    own_class: Ints
    others: Floats
    neighbours: Ints
    drawn: Floats

    @property
    def doubt(self) -> Floats:
        """float64 `[n]`: how much nearer another class is than their own."""
        return self.others[:, 0] - self.own

    @property
    def best(self) -> Floats:
        """float64 `[n]`: cosine to the nearest class of all."""
        return np.fmax(self.own, self.others[:, 0])

    @property
    def neighbour(self) -> Ints:
        """int64 `[n]`: the nearest other class; -1: none."""
        return self.neighbours[:, 0]


class Belonging(NamedTuple):
    """How images of another class are told from those of none.

    Attributes:
        discriminant: of `belonging_features`; None: it is the cosine alone.
        parting: of its score, among doubted images.
    """

    discriminant: Discriminant | None
    parting: Separation

    def score(self, near: Nearness, figures: npt.NDArray[Any]) -> Floats:
        """float64 `[n]`: how certain it is that images belong to the nearest other class."""
        return score_belonging(self.discriminant, near, figures)


class Strays(NamedTuple):
    """Files of what was found out about each image, and how.

    Attributes:
        kind: uint8 `[N]`, `RIGHT`, `WRONG_LABEL` or `FOREIGN`.
        neighbour: int32 `[N]`, the nearest other class.
        probability: float32 `[N]`, that `kind` is right.
        separation: how doubted images were told from others, by `Nearness.doubt`.
        belonging: how those of another class were told from those of none.
        figures: float32 `[C, 3]`, see `describe_classes`.
    """

    kind: npt.NDArray[Any]
    neighbour: npt.NDArray[Any]
    probability: npt.NDArray[Any]
    separation: Separation
    belonging: Belonging
    figures: npt.NDArray[Any]


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
    order = np.zeros((len(mine), 2), np.int64)
    order[:, 0] = usable.argmax(axis=1)
    first = np.take_along_axis(merged, order[:, :1], 1)
    order[:, 1] = (usable & (merged != first)).argmax(axis=1)
    there = np.take_along_axis(usable, order, 1)
    there[:, 1] &= np.take_along_axis(merged, order[:, 1:], 1)[:, 0] != first[:, 0]
    nearest = np.where(there, np.take_along_axis(cosines, order, 1), np.nan)
    neighbours = np.where(there, np.take_along_axis(others, order, 1), -1).astype(np.int64)
    drawn = np.asarray(scores.drawn[images]).astype(np.float64)
    return Nearness(own, mine.astype(np.int64), nearest, neighbours, drawn)


def describe_classes(
    members: Members, own: npt.NDArray[Any], dim: int, state: ClusterState
) -> npt.NDArray[Any]:
    """float32 `[C, 3]`: of each class median and spread of its images' `own`, and how many it has.

    The spread is the median without the lower quartile, the number is its logarithm.

    Args:
        members: images of each class.
        own: float32 `[N]`, see `ImageScores`.
        dim: D, which bounds how many are read together.
        state: gets the file.
    """
    found = state.array("class_figures", (len(members.counts), 3), "float32")
    groups = group_classes(members.counts, chunk_rows(dim))

    def _describe(piece: int) -> None:
        segments = segments_of(members, *groups[piece])
        if len(segments.classes):
            near = np.nan_to_num(np.asarray(own[segments.images]).astype(np.float64))
            middle, quarter = (segments.quantile(near, share) for share in (1 / 2, 1 / 4))
            numbers = np.log(members.counts[segments.classes])
            found[segments.classes] = np.stack([middle, middle - quarter, numbers], 1)

    state.run("class_figures", len(groups), _describe)
    return found


def belonging_features(
    nearest: Floats, second: Floats, classes: Ints, figures: npt.NDArray[Any]
) -> Floats:
    """float64 `[n, 5]`: what tells an image of a class from one that is merely nearest to it.

    Args:
        nearest: float64 `[n]`, cosine to the class.
        second: float64 `[n]`, cosine to the nearest class beside it.
        classes: int64 `[n]`, the class; -1: none.
        figures: see `describe_classes`.
    """
    middle, spread, number = np.asarray(figures[classes]).astype(np.float64).T
    features = np.stack([nearest, nearest - second, nearest - middle, spread, number], 1)
    features[classes < 0] = np.nan
    return features


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
    made = [known.best - known.drawn, known.others[:, 0] - known.drawn]
    separation = separate(known.doubt, made, settings.false_rate)
    figures = describe_classes(members, scores.own, rows.dim, state)
    rule = _learn_belonging(known, figures, max(separation.threshold, 0.0))
    kind = state.array("kind", (rows.count,), "uint8")
    neighbour = state.array("neighbour", (rows.count,), "int32")
    probability = state.array("probability", (rows.count,), "float32")

    def _decide(piece: int) -> None:
        here = slice(piece * _PART, min((piece + 1) * _PART, rows.count))
        near = read_nearness(scores, labels, ids, here)
        doubted = near.doubt >= max(separation.threshold, 0.0)
        wrong = separation.probability(near.doubt).sum(axis=0)
        belongs = rule.score(near, figures)
        of_other = rule.parting.probability(belongs)[0]
        is_other = belongs >= rule.parting.threshold
        found = np.where(doubted, np.where(is_other, WRONG_LABEL, FOREIGN), RIGHT)
        relabelled = np.flatnonzero(found == WRONG_LABEL)
        pair = np.asarray(labels[here])[relabelled].astype(np.int64), near.neighbour[relabelled]
        nearer = is_nearer(rows, members, used, here.start + relabelled, *pair)
        found[relabelled[~nearer]] = RIGHT
        chance = np.where(found == WRONG_LABEL, wrong * of_other, wrong * (1 - of_other))
        kind[here], neighbour[here] = found, near.neighbour
        probability[here] = np.where(found == RIGHT, 0, chance)

    state.run("strays", -(-rows.count // _PART), _decide)
    return Strays(kind, neighbour, probability, separation, rule, figures)


def _learn_belonging(known: Nearness, figures: npt.NDArray[Any], threshold: float) -> Belonging:
    """Learn from images that are not doubted, with their class and with it taken away."""
    right = known.doubt < 0
    own = belonging_features(known.own, known.others[:, 0], known.own_class, figures)
    away = belonging_features(known.others[:, 0], known.others[:, 1], known.neighbour, figures)
    discriminant = learn_discriminant(own[right], away[right])
    scores = score_belonging(discriminant, known, figures)[known.doubt >= threshold]
    if discriminant is None:
        high, low = known.best[right], known.others[right, 0]
    else:
        high, low = discriminant.score(own[right]), discriminant.score(away[right])
    return Belonging(discriminant, part_in_two(scores, high, low, _STRANGERS))


def score_belonging(
    discriminant: Discriminant | None, near: Nearness, figures: npt.NDArray[Any]
) -> Floats:
    """float64 `[n]`: see `Belonging.score`."""
    if discriminant is None:
        return near.others[:, 0]
    features = belonging_features(near.others[:, 0], near.others[:, 1], near.neighbour, figures)
    features[:, 1] = np.nan_to_num(features[:, 1])  # no second class was found
    return discriminant.score(features)


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
