"""What a training set shares with the sets that it is evaluated on: pictures, and identities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import (
    ClassCentres,
    Floats,
    find_centres,
    relatedness,
    unit_rows,
)
from pipelines.audit.classes.pairs import (
    DuplicateClasses,
    gather_some,
    measure_mixing,
    pair_features,
    some_used,
)
from pipelines.audit.images.neighbours import BUCKETS, Bucketed, fill_buckets, find_neighbours
from pipelines.audit.images.repeats import CANDIDATE_COSINE, PicturePairs, compare_pairs
from pipelines.audit.settings import CANDIDATES, AuditSettings
from pipelines.clustering.assign import ClassSearch
from pipelines.clustering.members import Members, sort_members
from pipelines.clustering.rows import Ints, UnitRows, release_pages
from pipelines.clustering.settings import chunk_rows
from pipelines.clustering.state import ClusterState
from pipelines.shards.index import ShardIndex

_PART: Final = 1 << 12  # classes that are compared together
_TESTED: Final = 128  # pairs of classes whose images are in memory together


@dataclass(frozen=True)
class EvaluationSet:
    """A set that the training set is compared with.

    Attributes:
        name: as findings name it.
        index: of its images.
        rows: their embeddings.
        labels: int32 `[M]`, its identities; None: they are not known.
    """

    name: str
    index: ShardIndex
    rows: UnitRows
    labels: npt.NDArray[Any] | None


@dataclass(frozen=True)
class TrainingSide:
    """What a set is compared with.

    Attributes:
        index: of the training set.
        buckets: its images.
        members: images of each class.
        parents: int64 `[C + parts]`, the class that each class is, or is a part of.
        centres: of the classes.
        search: among them.
        typical: see `typical_within`.
    """

    index: ShardIndex
    buckets: Bucketed
    members: Members
    parents: Ints
    centres: ClassCentres
    search: ClassSearch
    typical: float


class SharedIdentities(NamedTuple):
    """Identities of a set that are training classes.

    Attributes:
        classes: int64 `[P]`, training classes.
        identities: int64 `[P]`, classes of the set.
        samples: int64 `[P]`, an image of each identity.
        score: float64 `[P]`, see `DuplicateRule.score`.
        by_design: how many are shared, where it is so many that the set is one of these classes by
            its design; they are not listed then.
    """

    classes: Ints
    identities: Ints
    samples: Ints
    score: Floats
    by_design: int = 0


def find_copied(
    training: TrainingSide, other: EvaluationSet, side: int, name: str, state: ClusterState
) -> PicturePairs:
    """Pairs of a training image and the image of a set that it may be a copy of.

    Args:
        training: where copies are looked for.
        other: each image of this set is looked up.
        side: width and height at which pictures are compared, in pixels.
        name: of the stages.
        state: gets the files.
    """
    nearest = state.array(f"{name}_nearest", (other.rows.count, BUCKETS), "int32")
    size = chunk_rows(other.rows.dim)

    def _search(piece: int) -> None:
        start = piece * size
        part = other.rows.read(start, min(start + size, other.rows.count))
        nearest[start : start + len(part)] = training.search.find(part, BUCKETS)[1]

    state.run(f"{name}_nearest", -(-other.rows.count // size), _search)
    classes = len(training.centres.counts)
    queries = fill_buckets(other.rows, nearest, classes, f"{name}_bucket", state)
    images, cosines = find_neighbours(training.buckets, queries, name, state)
    near = np.flatnonzero((images >= 0) & (cosines >= CANDIDATE_COSINE))
    return compare_pairs((training.index, images[near]), (other.index, near), side, name, state)


def identity_threshold(duplicates: DuplicateClasses) -> float:
    """From where on an identity is a training class, by the score of the rule for classes.

    The threshold of classes that are one. If there are none in the training set, what is above all
    pairs of its classes, and is likelier for one class than for two.
    """
    if np.isfinite(duplicates.rule.separation.threshold):
        return duplicates.rule.separation.threshold
    return float(np.nextafter(np.max(duplicates.observed, initial=0.0), np.inf))


def find_shared_identities(
    training: TrainingSide,
    other: EvaluationSet,
    duplicates: DuplicateClasses,
    settings: AuditSettings,
    name: str,
    state: ClusterState,
) -> SharedIdentities:
    """Classes of a set that are a training class, by the rule for two training classes.

    If more than half of all classes are shared, the set is one of the training's classes, as for
    classification.

    Args:
        training: classes that are looked for.
        other: its classes are looked up.
        duplicates: with the rule.
        settings: for the seed.
        name: of the stages.
        state: gets the files.
    """
    no_pairs = np.empty(0, np.int64)
    none = SharedIdentities(no_pairs, no_pairs, no_pairs, np.empty(0))
    if other.labels is None or not len(other.labels):
        return none
    count = int(np.max(other.labels)) + 1
    members = sort_members(state, f"{name}_members", other.labels, count)
    centres = find_centres(other.rows, members, settings, state, f"{name}_")
    found = state.array(f"{name}_class", (count, CANDIDATES), "int32")
    related = state.array(f"{name}_related", (count, CANDIDATES), "float64")

    def _relate(piece: int) -> None:
        here = slice(piece * _PART, min((piece + 1) * _PART, count))
        found[here], related[here] = _relate_part(training, centres, here)

    state.run(f"{name}_related", -(-count // _PART), _relate)
    identities, position = np.nonzero(np.asarray(related) >= duplicates.rule.least)
    classes = np.asarray(found)[identities, position].astype(np.int64)
    mixing = _measure_mixing(training, other, (members, centres), (classes, identities))
    known = np.asarray(related)[identities, position]
    scores = duplicates.rule.score(pair_features(known, mixing))
    shared = scores >= identity_threshold(duplicates)
    classes, identities = training.parents[classes[shared]], identities[shared]
    distinct, filled = len(np.unique(identities)), int((members.counts > 0).sum())
    if 2 * distinct > filled:
        return none._replace(by_design=distinct)
    samples = members.some(identities, 1)[:, 0]
    return SharedIdentities(classes, identities, samples, scores[shared])


def _relate_part(training: TrainingSide, centres: ClassCentres, here: slice) -> tuple[Ints, Floats]:
    """The nearest training classes `[n, K]` of some classes of a set, and how related they are."""
    sums, counts = np.array(centres.sums[here]), np.asarray(centres.counts[here])
    _, classes = training.search.find(unit_rows(sums), CANDIDATES)
    squares = np.einsum("cd,cd->c", sums, sums, dtype=np.float64)
    related = np.full(classes.shape, np.nan)
    for position in range(CANDIDATES):
        theirs = classes[:, position]
        known = np.flatnonzero(theirs >= 0)
        mine = np.asarray(training.centres.sums[theirs[known]])
        related[known, position] = relatedness(
            np.einsum("cd,cd->c", sums[known], mine, dtype=np.float64),
            (squares[known], np.einsum("cd,cd->c", mine, mine, dtype=np.float64)),
            (counts[known], np.asarray(training.centres.counts[theirs[known]])),
            training.typical,
        )
        release_pages(training.centres.sums)
    return classes, related


def _measure_mixing(
    training: TrainingSide,
    other: EvaluationSet,
    theirs: tuple[Members, ClassCentres],
    pairs: tuple[Ints, Ints],
) -> Floats:
    """float64 `[P]`: how mixed images of a training class and of a class of a set are."""
    mixing = np.zeros(len(pairs[0]))
    members, centres = theirs
    for start in range(0, len(mixing), _TESTED):
        here = slice(start, start + _TESTED)
        first = some_used(training.members, training.centres.used, pairs[0][here])
        second = some_used(members, centres.used, pairs[1][here])
        mixing[here] = measure_mixing(
            gather_some(training.buckets.rows, first), gather_some(other.rows, second)
        )
    return mixing
