"""Classes that are one: candidates by their centres, confirmed on their images."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import ClassCentres, Floats, relatedness
from pipelines.audit.images.scores import find_others
from pipelines.audit.separation import Separation
from pipelines.audit.settings import CANDIDATES, SHOWN_TO_TEST
from pipelines.clustering.assign import ClassSearch
from pipelines.clustering.members import Members
from pipelines.clustering.rows import Ints, Rows, UnitRows
from pipelines.clustering.state import ClusterState

_PART: Final = 1 << 12  # classes that are compared together
_TESTED: Final = 128  # pairs of classes whose images are in memory together
_MIXED: Final = 0.5  # images find one of the other class so often, of what chance gives


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


def nearest_relatedness(pairs: CandidatePairs, classes: int) -> Floats:
    """float64 `[C]`: the relatedness of each class to the one most related; NaN: there is none."""
    best = np.full(classes, -np.inf)
    for side in (pairs.first, pairs.second):
        np.maximum.at(best, side, pairs.related)
    return np.where(np.isfinite(best), best, np.nan)


def confirm_pairs(
    pairs: CandidatePairs,
    chosen: Ints,
    rows: UnitRows,
    members: Members,
    used: npt.NDArray[Any],
) -> npt.NDArray[np.bool_]:
    """bool `[n]`: of chosen pairs, whether images of one class are mixed with those of the other.

    Each image finds its nearest one among those of both classes. In one class that was cut in two
    it is as often of the other part as chance has it (Schilling 1986, Henze 1988); in two classes
    that are merely similar it is of the same one. Half of what chance gives is asked for, less the
    standard deviation that chance has.

    Args:
        pairs: the candidates.
        chosen: int64 `[n]`, which of them.
        rows: of all images.
        members: images of each class.
        used: uint8 `[N]`, whether an image is one that its centre is made of.
    """
    confirmed = np.zeros(len(chosen), bool)
    for start in range(0, len(chosen), _TESTED):
        here = chosen[start : start + _TESTED]
        first, second = (
            gather_some(rows, some_used(members, used, side[here]))
            for side in (pairs.first, pairs.second)
        )
        confirmed[start : start + _TESTED] = are_mixed(first, second)
    return confirmed


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


def are_mixed(first: Rows, second: Rows) -> npt.NDArray[np.bool_]:
    """bool `[n]`: whether images of two classes are mixed; see `confirm_pairs`."""
    crossing, expected, variance = count_crossings(first, second)
    mixed: npt.NDArray[np.bool_] = crossing >= _MIXED * expected - np.sqrt(variance)
    return mixed & (crossing > 0)


def count_crossings(first: Rows, second: Rows) -> tuple[Floats, Floats, Floats]:
    """float64 `[n]` each: how many images' nearest one is of the other class, and by chance.

    Args:
        first, second: float32 `[n, K, D]`, images of both classes; rows of zeros: no more.

    Returns:
        How many are; how many are expected if classes were drawn; about their variance then.
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
    variance = (chance * (1 - chance)).sum(axis=1)
    return crosses.sum(axis=1).astype(np.float64), chance.sum(axis=1), variance


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
        related: float64 `[P]`, see `relatedness`.
        probability: float64 `[P]`.
        groups: int64 `[P]`, see `group_pairs`.
        ids: int64 `[C + parts]`, the class that each class or part is merged into.
        separation: how they were told.
        observed: float64 `[C]`, of each class the statistic that was examined.
    """

    first: Ints
    second: Ints
    related: Floats
    probability: Floats
    groups: Ints
    ids: Ints
    separation: Separation
    observed: Floats


def find_duplicates(
    pairs: CandidatePairs,
    observed: Floats,
    parents: Ints,
    separation: Separation,
    rows: UnitRows,
    members: Members,
    used: npt.NDArray[Any],
) -> DuplicateClasses:
    """The pairs above the threshold that their images confirm.

    Args:
        pairs: candidates.
        observed: float64 `[C]`, see `nearest_relatedness`.
        parents: int64 `[C + parts]`, the class that each class is, or is a part of.
        separation: of the relatedness.
        rows: of all images.
        members: images of each class and part.
        used: uint8 `[N]`, whether an image is one that its class's centre is made of.
    """
    chosen = np.flatnonzero(pairs.related >= separation.threshold)
    chosen = chosen[confirm_pairs(pairs, chosen, rows, members, used)]
    order = np.lexsort((pairs.second[chosen], pairs.first[chosen], -pairs.related[chosen]))
    chosen = chosen[order]
    first, second, related = pairs.first[chosen], pairs.second[chosen], pairs.related[chosen]
    groups = group_pairs(first, second)
    ids = merged_ids(first, second, groups, len(parents))[parents]
    chance = separation.probability(related)[0]
    return DuplicateClasses(first, second, related, chance, groups, ids, separation, observed)
