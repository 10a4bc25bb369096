"""One audit: from the embeddings of a data set to its findings, from where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.audit.classes.centres import Floats, find_centres, halves_relatedness, typical_within
from pipelines.audit.classes.mixed import MixedStatistics, cut_all, take_parts
from pipelines.audit.classes.pairs import (
    DuplicateClasses,
    compare_classes,
    find_duplicates,
    learn_duplicates,
)
from pipelines.audit.evaluation_sets import (
    EvaluationSet,
    SharedIdentities,
    TrainingSide,
    find_copied,
    find_shared_identities,
)
from pipelines.audit.images.neighbours import (
    fill_buckets,
    find_neighbours,
    measure_recall,
    nearest_classes,
)
from pipelines.audit.images.repeats import (
    PicturePairs,
    compare_pairs,
    learn_copies,
    repeated_pairs,
)
from pipelines.audit.images.scores import ImageScores, index_classes, score_images
from pipelines.audit.images.strays import Strays, find_strays
from pipelines.audit.separation import Separation, separate
from pipelines.audit.settings import FORMAT, AuditSettings
from pipelines.clustering.hierarchy import find_mean
from pipelines.clustering.members import sort_members
from pipelines.clustering.quality import measure_recall as measure_class_recall
from pipelines.clustering.rows import Ints, UnitRows, refuse_other_rows
from pipelines.clustering.state import ClusterState, StagedJob, Watch
from pipelines.shards.index import ShardIndex

# Of the first cut, see `separate`: a class that is cut in vain does no harm.
_CUT_BOUNDS: Final = (0.1, 1.0, 0.2)
_PART: Final = 1 << 20  # images whose labels are read together

ReadClasses = Callable[[int, int], npt.NDArray[Any]]
"""From `(start, stop)` to int64 `[stop - start]`, the classes of these images; -1: none."""


class SharedWithSet(NamedTuple):
    """What the training set shares with one that it is evaluated on.

    Attributes:
        other: the set.
        copies: pairs of a training image and an image of the set that may be the same picture.
        identities: classes that are in both.
    """

    other: EvaluationSet
    copies: PicturePairs
    identities: SharedIdentities


class AuditResult(NamedTuple):
    """Everything that was found out, to be written down.

    Attributes:
        labels: int32 `[N]`, that were examined.
        parted: int32 `[N]`, labels with parts of mixed classes as classes of their own.
        parents: int64, the class that each of these is, or is a part of.
        duplicates, strays, mixed, mixed_separation: of each kind its findings and threshold.
        scores: of all images.
        repeats: pairs of pictures of the training set that may be the same.
        copies: float64, how similar worse copies of pictures are to them.
        shared: for each evaluation set.
        class_recall, image_recall: share of the nearest classes and images that were found.
        false_rate: that was asked for.
        seconds: since the command began, without earlier attempts.
    """

    labels: npt.NDArray[Any]
    parted: npt.NDArray[Any]
    parents: Ints
    duplicates: DuplicateClasses
    strays: Strays
    mixed: MixedStatistics
    mixed_separation: Separation
    scores: ImageScores
    repeats: PicturePairs
    copies: Floats
    shared: list[SharedWithSet]
    class_recall: float
    image_recall: float
    false_rate: float
    seconds: float


class AuditJob(StagedJob):
    """One audit, finished or not.

    Attributes:
        index: the data set.
        settings: what is asked for.
    """

    def __init__(
        self,
        target: str,
        index: ShardIndex,
        rows: npt.NDArray[Any],
        read_labels: ReadClasses,
        num_classes: int,
        sets: Sequence[EvaluationSet],
        recipe: dict[str, Any],
        settings: AuditSettings,
        image_side: int,
    ) -> None:
        """Claim the target, or go on with it.

        Args:
            target: folder of the audit, on this machine; it must not exist.
            index: the data set.
            rows: floating point `[N, D]` in the order of the index, usually memory-mapped.
            read_labels: gives the classes of consecutive images.
            num_classes: C.
            sets: those that it is evaluated on.
            recipe: JSON-able; tells these embeddings, labels and sets from others.
            settings: what is asked for.
            image_side: width and height at which pictures are compared, in pixels.

        Raises:
            UserError: the target exists or is not on this machine, something else is being made
                there, or there is nothing to examine.
        """
        settings.validate()
        refuse_other_rows(index, rows)
        if num_classes < 2:
            raise UserError(f"{index.folder}: an audit compares classes, and there are not two")
        self.index, self.settings = index, settings
        self._rows, self._sets = UnitRows(rows), list(sets)
        self._read_labels, self._classes = read_labels, num_classes
        self._side = image_side
        self._began = time.monotonic()
        super().__init__(
            target, "an audit is", {"format": FORMAT, "settings": settings.as_dict(), **recipe}
        )

    def run(self, watch: Watch, workers: int = 1) -> AuditResult | None:
        """Find everything; the findings do not depend on the number of threads.

        Classes are cut first, and parts that are far apart count as classes of their own; else the
        smaller part would be taken for strays. Then come centres that strays have no part in,
        classes that are one, and strays. At last classes are cut without their strays.

        Args:
            watch: is told of progress.
            workers: threads.

        Returns:
            Everything that was found out; None if an earlier attempt had written it down.
        """
        state, settings = self._open_state(watch, workers), self.settings
        if state.is_finished:
            return None
        rows, labels = self._prepare_rows(state), self._write_labels(state)
        whole = sort_members(state, "whole_members", labels, self._classes)
        first_cut = cut_all(rows, whole, None, settings, state, "first_cut")
        first_separation = separate(first_cut.apart, [first_cut.joined], *_CUT_BOUNDS)
        parted, parents = take_parts(labels, first_cut, first_separation.threshold, state)
        members = sort_members(state, "members", parted, len(parents))
        centres = find_centres(rows, members, settings, state)
        typical = typical_within(centres)
        search = index_classes(centres, settings, state)
        scores = score_images(rows, parted, centres, search, settings, state)
        pairs = compare_classes(centres, search, self._classes, typical, state)
        halves = halves_relatedness(centres, typical)[: self._classes]
        rule, near, likeness = learn_duplicates(
            *(pairs, halves, rows, members, centres, settings, state)
        )
        duplicates = find_duplicates(pairs, near, likeness, parents, rule)
        strays = find_strays(
            *(rows, scores, parted, members, centres.used),
            *(duplicates.ids, settings, state),
        )
        mixed = cut_all(rows, whole, strays.kind, settings, state)
        cut = separate(mixed.apart, [mixed.joined], settings.false_rate)
        nearest = nearest_classes(scores, parted, "nearest", state)
        buckets = fill_buckets(rows, nearest, len(parents), "bucket", state)
        neighbours, cosines = find_neighbours(buckets, buckets, "repeated", state)
        candidates = repeated_pairs(neighbours, cosines)
        index, side = self.index, self._side
        one, other = ((index, numbers) for numbers in candidates)
        repeats = compare_pairs(one, other, side, "repeated", state)
        copies = learn_copies(index, side, settings, state)
        training = TrainingSide(index, buckets, members, parents, centres, search, typical)
        shared = [
            self._compare_set(training, each, duplicates, f"set{number}", state)
            for number, each in enumerate(self._sets)
        ]
        recalls = self._measure(rows, search, centres.sums.shape, cosines, state)
        spent = time.monotonic() - self._began
        return AuditResult(
            *(labels, parted, parents, duplicates, strays, mixed, cut, scores, repeats, copies),
            *(shared,),
            *(*recalls, settings.false_rate, spent),
        )

    def _prepare_rows(self, state: ClusterState) -> UnitRows:
        self._mean = find_mean(self._rows, self.settings.seed, state)
        return self._rows.centered(self._mean)

    def _write_labels(self, state: ClusterState) -> npt.NDArray[Any]:
        """int32 `[N]`: the classes of all images as a file."""
        count = self.index.samples
        labels = state.array("labels", (count,), "int32")

        def _read(piece: int) -> None:
            start, stop = piece * _PART, min((piece + 1) * _PART, count)
            labels[start:stop] = self._read_labels(start, stop)

        state.run("labels", -(-count // _PART), _read)
        return labels

    def _compare_set(
        self,
        training: TrainingSide,
        other: EvaluationSet,
        duplicates: DuplicateClasses,
        name: str,
        state: ClusterState,
    ) -> SharedWithSet:
        centred = replace(other, rows=other.rows.centered(self._mean))
        copies = find_copied(training, centred, self._side, name, state)
        identities = find_shared_identities(
            training, centred, duplicates, self.settings, name, state
        )
        return SharedWithSet(centred, copies, identities)

    def _measure(
        self,
        rows: UnitRows,
        search: Any,
        shape: tuple[int, int],
        cosines: npt.NDArray[Any],
        state: ClusterState,
    ) -> tuple[float, float]:
        """Share of the nearest classes, and of the nearest images, that were found."""
        seed = self.settings.seed

        def _measure_both() -> None:
            units = state.array("units", shape, "float32")
            classes = measure_class_recall(rows, search, units, seed)
            images = measure_recall(rows, cosines, seed)
            state.save_small("recall", recall=np.array([classes, images]))

        state.once("recall", _measure_both)
        classes, images = state.load_small("recall")["recall"].tolist()
        return classes, images
