"""What a model gets wrong: classes taken for each other, the hardest pairs, accuracy by class.

Everything comes from the result of the identification, without comparing images again, but for the
pairs of a probe and the entries of its own class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.evaluate.metrics.identification import Identification
from pipelines.evaluate.metrics.roc import Floats, Ints

SHOWN: Final = 12  # pairs of each kind that are kept
ACCURACY_BINS: Final = 11  # ten of 10 % each, and the classes of which everything was found
_PAIRS: Final = 1 << 15  # that are compared together


class IdentifiedSet(NamedTuple):
    """A set of images, and the result of looking its probes up in its gallery.

    Attributes:
        rows: `[N, D]`, rows of length 1.
        labels: int64 `[N]`.
        gallery, probes: numbers of the enrolled images `[G]` and of all others `[P]`.
        result: of `identify`, which numbers the gallery from 0.
    """

    rows: Floats
    labels: Ints
    gallery: Ints
    probes: Ints
    result: Identification


def find_hard_cases(found: IdentifiedSet) -> dict[str, npt.NDArray[Any]]:
    """Arrays of a few kilobytes, whatever the size of the set.

    Returns:
        `class_accuracy` int64 `[11]`: how many classes have which share of their probes found at
        rank 1, in tenths, the last one for all of them.
        `confused` int64 `[n, 2]`: classes that are most often taken for each other, in order;
        `confused_counts` int64 `[n, 2]`: how many probes of the two were, and how many they have;
        `confused_images` int64 `[n, 2]`: the clearest mistake, a probe and the entry it was taken
        for.
        `genuine_pairs` int64 `[n, 2]`, `genuine_scores` `[n]`: probe and entry of one class with
        the lowest cosines, at most one pair of a class.
        `impostor_pairs`, `impostor_scores`: probe and entry of two classes with the highest
        cosines among the nearest entries of each probe, at most one pair of the same two classes.
        `genuine_classes`, `impostor_classes` int64 `[n, 2]`: classes of those images.
    """
    nearest = found.gallery[found.result.nearest]
    probes = np.repeat(found.probes, nearest.shape[1]).reshape(nearest.shape)
    is_wrong = found.labels[nearest] != found.labels[probes]
    wrong = np.stack([probes[is_wrong], nearest[is_wrong]], 1)
    cases = {"class_accuracy": _accuracy_by_class(found)}
    cases |= _confusions(found, nearest, is_wrong)
    cases |= _hardest("impostor", found.labels, wrong, -found.result.scores[is_wrong], -1)
    entries, scores = _furthest_of_own_class(found)
    own = np.stack([found.probes, entries], 1)[entries >= 0]
    return cases | _hardest("genuine", found.labels, own, scores[entries >= 0], 1)


def _furthest_of_own_class(found: IdentifiedSet) -> tuple[Ints, Floats]:
    """For each probe the image number of its class's least similar entry, and the score; or -1."""
    order = found.gallery[np.argsort(found.labels[found.gallery], kind="stable")]
    own = found.labels[found.probes]
    first = np.searchsorted(found.labels[order], own)
    counts = np.searchsorted(found.labels[order], own, "right") - first
    entries, scores = np.full(len(own), -1), np.full(len(own), np.inf)
    for number in range(int(counts.max(initial=0))):
        probes = np.flatnonzero(counts > number)
        for start in range(0, len(probes), _PAIRS):
            part = probes[start : start + _PAIRS]
            entry = order[first[part] + number]
            score = np.einsum("nd,nd->n", found.rows[found.probes[part]], found.rows[entry])
            lower = score < scores[part]
            scores[part[lower]], entries[part[lower]] = score[lower], entry[lower]
    return entries, scores


def _accuracy_by_class(found: IdentifiedSet) -> Ints:
    enrolled = found.result.ranks > 0
    _, numbers = np.unique(found.labels[found.probes][enrolled], return_inverse=True)
    right = np.bincount(numbers, found.result.ranks[enrolled] == 1)
    share = right / np.bincount(numbers)
    bins = np.floor(share * (ACCURACY_BINS - 1) + 1e-9).astype(np.int64)
    return np.bincount(bins, minlength=ACCURACY_BINS)


def _confusions(
    found: IdentifiedSet, nearest: Ints, is_wrong: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    missed = np.flatnonzero((found.result.ranks > 1) & is_wrong.any(axis=1))
    column = is_wrong[missed].argmax(axis=1)  # of the nearest wrong entry
    order = np.argsort(-found.result.scores[missed, column], kind="stable")  # clearest first
    images = np.stack([found.probes[missed], nearest[missed, column]], 1)[order]
    pairs = np.sort(found.labels[images], axis=1)
    classes, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    top = np.lexsort((first, -counts))[:SHOWN]
    ids, sizes = np.unique(found.labels[found.probes], return_counts=True)
    probes = dict(zip(ids.tolist(), sizes.tolist(), strict=True))
    of_both = [sum(probes.get(each, 0) for each in pair) for pair in classes[top].tolist()]
    return {
        "confused": found.labels[images[first[top]]],
        "confused_counts": np.stack([counts[top], np.array(of_both, np.int64)], 1),
        "confused_images": images[first[top]],
    }


def _hardest(
    name: str, labels: Ints, pairs: Ints, hardness: Floats, sign: int
) -> dict[str, npt.NDArray[Any]]:
    """The pairs with the lowest `hardness`, no two of the same classes; `sign` makes it a score."""
    order = np.argsort(hardness, kind="stable")
    chosen = list(_of_other_classes(labels[pairs], order))
    return {
        f"{name}_pairs": pairs[chosen],
        f"{name}_classes": labels[pairs[chosen]],
        f"{name}_scores": sign * hardness[chosen],
    }


def _of_other_classes(classes: Ints, order: Ints) -> Iterator[int]:
    """The first numbers of an order whose two classes have not come before."""
    seen: set[tuple[int, ...]] = set()
    for number in order.tolist():
        pair = tuple(sorted(classes[number].tolist()))
        if pair not in seen:
            seen.add(pair)
            yield number
        if len(seen) == SHOWN:
            return
