"""Classes that are one: candidates by their centres, confirmed on their images."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import ClassCentres, Floats, relatedness
from pipelines.audit.discriminant import Discriminant, learn_discriminant
from pipelines.audit.images.scores import find_others
from pipelines.audit.separation import Separation, separate
from pipelines.audit.settings import CANDIDATES, SHOWN_TO_TEST, AuditSettings
from pipelines.clustering.assign import ClassSearch
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.state import ClusterState

_PART: Final = 1 << 12  # classes that are compared together
_TESTED: Final = 128  # pairs of classes whose images are in memory together
_MISSED: Final = 0.05  # share of classes that are one and are not looked at
_EXAMINED: Final = 20_000  # pairs of a class and the nearest one, about, that are learned from
# Share of the pairs found that may be false, as estimated. Classes that look the same are more than
# the tail of the others has it: 4 and 5 in 100 were false on two seeds (docs/audit.md).
_FALSE_PAIRS: Final = 0.03
_HALVES: Final = 2000  # classes whose halves are looked at, about


class CandidatePairs(NamedTuple):
    """Pairs of classes that are near one another, each once.

    Attributes:
        first, second: int64 `[P]`, `first < second`.
        related: float64 `[P]`, see `relatedness`.
    """

    first: Ints
    second: Ints
    related: Floats


def compare_classes(
    centres: ClassCentres, search: ClassSearch, whole: int, typical: float, state: ClusterState
) -> CandidatePairs:
    """The relatedness of every class with those nearest to it.

    Args:
        centres, search: of all classes.
        whole: classes from this number on are parts, and in no pair.
        typical: see `typical_within`.
        state: gets the files.
    """
    classes = len(centres.counts)
    found = state.array("class_others", (classes, CANDIDATES), "int32")
    related = state.array("class_related", (classes, CANDIDATES), "float64")
    units = state.array("units", centres.sums.shape, "float32")

    def _compare(piece: int) -> None:
        start = piece * _PART
        part = np.array(units[start : start + _PART])
        own = np.arange(start, start + len(part))
        others, _ = find_others(search, part, own, CANDIDATES)
        here = slice(start, start + len(part))
        found[here] = others
        for position in range(CANDIDATES):
            related[here, position] = relate(centres, own, others[:, position], typical)

    state.run("class_pairs", -(-classes // _PART), _compare)
    others = np.asarray(found).astype(np.int64)
    own = np.repeat(np.arange(classes), CANDIDATES).reshape(others.shape)
    usable = (others >= 0) & ~np.isnan(related) & (np.maximum(own, others) < whole)
    low, high = np.minimum(own, others)[usable], np.maximum(own, others)[usable]
    _, once = np.unique(low * classes + high, return_index=True)
    return CandidatePairs(low[once], high[once], np.asarray(related)[usable][once])


def relate(centres: ClassCentres, first: Ints, second: Ints, typical: float) -> Floats:
    """float64 `[k]`: the relatedness of pairs of classes; NaN where one has no image, or is -1."""
    known = (first >= 0) & (second >= 0)
    found = np.full(len(first), np.nan)
    if not known.any():
        return found
    pair = first[known], second[known]
    sums = tuple(np.asarray(centres.sums[each]).astype(np.float64) for each in pair)
    counts = tuple(np.asarray(centres.counts[each]) for each in pair)
    squares = tuple(np.einsum("cd,cd->c", each, each) for each in sums)
    products = np.einsum("cd,cd->c", *sums)
    found[known] = relatedness(products, (squares[0], squares[1]), (counts[0], counts[1]), typical)
    return found


class DuplicateRule(NamedTuple):
    """How two classes that are one are told.

    Attributes:
        least: relatedness below which no pair is looked at; nine of ten halves of a class have it.
        discriminant: of `pair_features`; None: there are hardly any classes, relatedness counts.
        separation: of its score.
    """

    least: float
    discriminant: Discriminant | None
    separation: Separation

    def score(self, features: Floats) -> Floats:
        """float64 `[n]` of pairs of classes by their features `[n, 2]`."""
        return _score(self.discriminant, features)


def _score(discriminant: Discriminant | None, features: Floats) -> Floats:
    return features[:, 0] if discriminant is None else discriminant.score(features)


def pair_features(related: Floats, mixing: Floats) -> Floats:
    """float64 `[n, 2]`: what tells two classes that are one from two that are similar.

    Their sizes are no feature: halves, which are learned from, are smaller than classes.

    Args:
        related: float64 `[n]`, see `relatedness`.
        mixing: float64 `[n]`, see `measure_mixing`.
    """
    return np.stack([related, mixing], axis=1)


def learn_duplicates(
    pairs: CandidatePairs,
    halves: Floats,
    rows: UnitRows,
    members: Members,
    centres: ClassCentres,
    settings: AuditSettings,
    state: ClusterState,
) -> tuple[DuplicateRule, Ints, Floats]:
    """Learn how two classes that are one differ from others: from halves of classes.

    Args:
        pairs: candidates.
        halves: float64 `[C]`, the relatedness of two halves of each class.
        rows: of all images.
        members, centres: of all classes.
        settings: the false rate.
        state: gets the files.

    Returns:
        The rule; which pairs are looked at, int64 `[Q]`; and their scores.
    """
    known = halves[~np.isnan(halves)]
    least = float(np.quantile(known, _MISSED)) if len(known) else np.inf
    drawn = _nearest_pairs(pairs, len(halves))
    near = np.union1d(np.flatnonzero(pairs.related >= least), drawn)
    mixing = state.array("pair_mixing", (max(1, len(near)),), "float64")

    def _measure(piece: int) -> None:
        here = slice(piece * _TESTED, min((piece + 1) * _TESTED, len(near)))
        images = [some_used(members, centres.used, side[near[here]]) for side in pairs[:2]]
        mixing[here] = measure_mixing(*(gather_some(rows, each) for each in images))

    state.run("pair_mixing", -(-len(near) // _TESTED), _measure)
    cut = np.flatnonzero(halves >= least)
    cut = cut[:: max(1, len(cut) // _HALVES)]
    made_mixing = state.array("half_mixing", (max(1, len(cut)),), "float64")

    def _measure_halves(piece: int) -> None:
        here = slice(piece * _TESTED, min((piece + 1) * _TESTED, len(cut)))
        images = members.some(cut[here], 2 * SHOWN_TO_TEST)
        images[np.asarray(centres.used)[images] == 0] = -1
        parts = images[:, ::2], images[:, 1::2]
        made_mixing[here] = measure_mixing(*(gather_some(rows, each) for each in parts))

    state.run("half_mixing", -(-len(cut) // _TESTED), _measure_halves)
    seen = pair_features(pairs.related[near], np.asarray(mixing)[: len(near)])
    made = pair_features(halves[cut], np.asarray(made_mixing)[: len(cut)])
    at = np.searchsorted(near, drawn)
    discriminant = learn_discriminant(made, seen[at])
    scores = _score(discriminant, seen)
    made_scores = _score(discriminant, made)
    bounds = settings.false_rate, _FALSE_PAIRS
    separation = separate(scores[at], [made_scores], *bounds)
    scores[pairs.related[near] < least] = -np.inf
    return DuplicateRule(least, discriminant, separation), near, scores


def _nearest_pairs(pairs: CandidatePairs, classes: int) -> Ints:
    """int64: pairs of a class and the one most related to it, of some classes, evenly drawn."""
    best = np.full(classes, -np.inf)
    for side in pairs[:2]:
        np.maximum.at(best, side, pairs.related)
    is_best = (pairs.related == best[pairs.first]) | (pairs.related == best[pairs.second])
    found = np.flatnonzero(is_best)
    return found[:: max(1, len(found) // _EXAMINED)]


def some_used(members: Members, used: npt.NDArray[Any], classes: Ints) -> Ints:
    """int64 `[n, K]`: some images of each class that its centre is made of; -1: no image."""
    images = members.some(classes, SHOWN_TO_TEST)
    images[np.asarray(used)[images] == 0] = -1
    return images


def gather_some(rows: UnitRows, images: Ints) -> Rows:
    """float32 `[..., D]` of images by their numbers; zeros where the number is -1."""
    there = images >= 0
    vectors = np.zeros((*images.shape, rows.dim), np.float32)
    vectors[there] = rows.gather(images[there])
    return vectors


def measure_mixing(first: Rows, second: Rows) -> Floats:
    """float64 `[n]`: how often images' nearest one is of the other class, of what chance gives.

    Each image looks for its nearest one among those of both classes. In one class that was cut in
    two it is as often of the other part as chance has it, 1; in two classes that are merely similar
    it is of the same one, 0 (Schilling 1986, Henze 1988).

    Args:
        first, second: float32 `[n, K, D]`, images of both classes; rows of zeros: no more.
    """
    crossing, expected = count_crossings(first, second)
    found: Floats = crossing / np.maximum(expected, 1e-12)
    return found


def count_crossings(first: Rows, second: Rows) -> tuple[Floats, Floats]:
    """float64 `[n]` each: how many images' nearest one is of the other class, and by chance.

    Args:
        first, second: float32 `[n, K, D]`, images of both classes; rows of zeros: no more.

    Returns:
        How many are, and how many are expected if the classes were drawn.
    """
    vectors = np.concatenate([first, second], axis=1)
    there = np.asarray(vectors.any(axis=2))
    cosines = vectors @ vectors.transpose(0, 2, 1)
    cosines[~(there[:, :, None] & there[:, None, :])] = -np.inf
    position = np.arange(vectors.shape[1])
    cosines[:, position, position] = -np.inf
    is_second = position >= first.shape[1]
    crosses = (is_second[cosines.argmax(axis=2)] != is_second) & there
    sizes = np.stack([(there & ~is_second).sum(axis=1), (there & is_second).sum(axis=1)], 1)
    other = np.where(is_second, sizes[:, :1], sizes[:, 1:])
    chance = np.where(there, other / np.maximum(sizes.sum(axis=1) - 1, 1)[:, None], 0.0)
    return crosses.sum(axis=1).astype(np.float64), chance.sum(axis=1)


def group_pairs(first: Ints, second: Ints) -> Ints:
    """int64 `[P]`: the component that each confirmed pair is merged in; -1: it is not.

    A component is merged if each two of its classes are a confirmed pair. Of a larger one pairs are
    taken in the order given, the most certain first, as long as that holds of what they make: no
    chain of pairs merges classes that were not confirmed.

    Args:
        first, second: int64 `[P]`, `first < second`, the most certain first.

    Returns:
        Components are numbered by their first pair.
    """
    confirmed = set(zip(first.tolist(), second.tolist(), strict=True))
    component: dict[int, list[int]] = {}
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        left, right = component.get(one, [one]), component.get(other, [other])
        if left is right:
            continue
        if all((min(a, b), max(a, b)) in confirmed for a in left for b in right):
            whole = left + right
            component.update(dict.fromkeys(whole, whole))
    numbers: dict[int, int] = {}
    groups = np.full(len(first), -1, np.int64)
    for position, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        whole = component.get(one, [])
        if component.get(other) is whole and whole:
            groups[position] = numbers.setdefault(min(whole), len(numbers))
    return groups


def merged_ids(first: Ints, second: Ints, groups: Ints, classes: int) -> Ints:
    """int64 `[C]`: the class that each class is merged into, the one with the lowest number."""
    ids = np.arange(classes)
    inside = groups >= 0
    lowest = np.full(int(groups.max(initial=-1)) + 1, classes)
    np.minimum.at(lowest, groups[inside], first[inside])
    for side in (first, second):
        ids[side[inside]] = lowest[groups[inside]]
    return ids


class DuplicateClasses(NamedTuple):
    """Classes that are one.

    Attributes:
        first, second: int64 `[P]`, the most certain first.
        score: float64 `[P]`, of the rule.
        probability: float64 `[P]`.
        groups: int64 `[P]`, see `group_pairs`.
        ids: int64 `[C + parts]`, the class that each class or part is merged into.
        rule: how they were told.
        observed: float64, scores of all pairs that were looked at.
    """

    first: Ints
    second: Ints
    score: Floats
    probability: Floats
    groups: Ints
    ids: Ints
    rule: DuplicateRule
    observed: Floats


def find_duplicates(
    pairs: CandidatePairs, near: Ints, scores: Floats, parents: Ints, rule: DuplicateRule
) -> DuplicateClasses:
    """The pairs above the threshold.

    Args:
        pairs: candidates.
        near: int64 `[Q]`, which of them were looked at.
        scores: float64 `[Q]`, of these.
        parents: int64 `[C + parts]`, the class that each class is, or is a part of.
        rule: with the threshold.
    """
    found = np.flatnonzero(scores >= rule.separation.threshold)
    first, second, score = pairs.first[near[found]], pairs.second[near[found]], scores[found]
    order = np.lexsort((second, first, -score))
    first, second, score = first[order], second[order], score[order]
    groups = group_pairs(first, second)
    ids = merged_ids(first, second, groups, len(parents))[parents]
    chance = rule.separation.probability(score)[0]
    return DuplicateClasses(first, second, score, chance, groups, ids, rule, scores)
