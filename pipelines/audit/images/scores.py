"""How near each image is to its own class, to others, and to classes that are drawn."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import derive, generator, sample_without_replacement
from pipelines.audit.classes.centres import ClassCentres, leave_one_out, mix, unit_rows
from pipelines.audit.settings import NEAREST, AuditSettings
from pipelines.clustering.assign import NO_CLASS, ClassSearch
from pipelines.clustering.kmeans import find_nearest, spherical_kmeans
from pipelines.clustering.rows import Ints, Rows, UnitRows, release_pages
from pipelines.clustering.settings import ONE_LEVEL, chunk_rows, sample_size
from pipelines.clustering.state import ClusterState

_PART: Final = 1 << 14  # classes that are read together


class ImageScores(NamedTuple):
    """Files of how near each image is to classes; cosines to their centres.

    Attributes:
        own: float32 `[N]`, to its own class without it; NaN if there is no other image, or no
            label.
        others: int32 `[N, K]`, the nearest classes beside its own, the nearest first; `NO_CLASS`
            where there is none.
        cosines: float32 `[N, K]`, to them.
        drawn: float32 `[N]`, to a class that is drawn for it; NaN if that is its own.
    """

    own: npt.NDArray[Any]
    others: npt.NDArray[Any]
    cosines: npt.NDArray[Any]
    drawn: npt.NDArray[Any]


def open_scores(state: ClusterState, samples: int) -> ImageScores:
    """The files of a state."""
    return ImageScores(
        state.array("own", (samples,), "float32"),
        state.array("others", (samples, NEAREST), "int32"),
        state.array("cosines", (samples, NEAREST), "float32"),
        state.array("drawn", (samples,), "float32"),
    )


def index_classes(
    centres: ClassCentres, settings: AuditSettings, state: ClusterState
) -> ClassSearch:
    """The search among the centres; many are dealt to cells, of which the nearest 8 are searched.

    `units` of the state holds the centres with length 1, float32 `[C, D]`; classes without an image
    have a row of zeros.
    """
    classes, dim = centres.sums.shape
    units = state.array("units", (classes, dim), "float32")

    def _scale(piece: int) -> None:
        here = slice(piece * _PART, (piece + 1) * _PART)
        units[here] = unit_rows(np.asarray(centres.sums[here]))

    state.run("units", -(-classes // _PART), _scale)

    def _deal() -> None:
        cells = np.zeros((1, dim), np.float32)
        owners = np.zeros(classes, np.int32)
        if classes > ONE_LEVEL:
            count = round(classes**0.5)
            drawn = sample_without_replacement(
                classes,
                sample_size(count, dim, classes),
                generator(settings.seed, "audit/cells"),
            )
            key = derive(settings.seed, "audit/cells/start") & 0x7FFFFFFF
            cells = spherical_kmeans(np.array(units[drawn]), count, key)
            for start in range(0, classes, _PART):
                part = np.array(units[start : start + _PART])
                owners[start : start + _PART] = find_nearest(part, cells, 1)[1][:, 0]
        state.save_small("class_cells", cells=cells, owners=owners)

    state.once("class_cells", _deal)
    found = state.load_small("class_cells")
    return ClassSearch(units, found["cells"], found["owners"])


def score_images(
    rows: UnitRows,
    labels: npt.NDArray[Any],
    centres: ClassCentres,
    search: ClassSearch,
    settings: AuditSettings,
    state: ClusterState,
) -> ImageScores:
    """Compare every image with its class and the nearest others, part by part.

    Args:
        rows: of all images.
        labels: int32 `[N]`; `NO_CLASS`: an image has none.
        centres, search: of the classes.
        settings: for the seed.
        state: gets the files.
    """
    scores, size = open_scores(state, rows.count), chunk_rows(rows.dim)
    key = derive(settings.seed, "audit/drawn")

    def _score(piece: int) -> None:
        start = piece * size
        part = rows.read(start, min(start + size, rows.count))
        here = slice(start, start + len(part))
        own = np.asarray(labels[here])
        scores.own[here] = _score_own(part, own, np.asarray(centres.used[here]), centres)
        classes, cosines = find_others(search, part, own, NEAREST)
        scores.others[here], scores.cosines[here] = classes, cosines
        numbers = np.arange(start, start + len(part))
        other = np.asarray(labels[(mix(numbers, key) % np.uint64(len(labels))).astype(np.int64)])
        unused = np.zeros(len(part), bool)
        drawn = _score_own(part, other, unused, centres)
        drawn[other == own] = np.nan
        scores.drawn[here] = drawn

    state.run("scores", -(-rows.count // size), _score)
    return scores


def _score_own(
    part: Rows, classes: npt.NDArray[Any], used: npt.NDArray[Any], centres: ClassCentres
) -> npt.NDArray[np.float64]:
    """float64 `[m]`: cosine to the centre of a class, without the row itself where it is used."""
    known = classes >= 0
    chosen = np.where(known, classes, 0)
    sums, counts = np.asarray(centres.sums[chosen]), np.asarray(centres.counts[chosen])
    release_pages(centres.sums)
    found = leave_one_out(part, sums, used, counts)
    found[~known | ~part.any(axis=1)] = np.nan
    return found


def find_others(
    search: ClassSearch, part: Rows, own: npt.NDArray[Any], count: int
) -> tuple[Ints, Rows]:
    """The nearest classes `[m, count]` and the cosines to them, without each row's own class.

    Args:
        search: among all classes.
        part: float32 `[m, D]`, of length 1.
        own: `[m]`, the class that a row must not find; `NO_CLASS`: none.
        count: how many.
    """
    cosines, classes = search.find(part, count + 1)
    is_own = (classes == own[:, None]) & (classes != NO_CLASS)
    is_own[~is_own.any(axis=1), -1] = True  # the others lose their last
    shape = (len(part), count)
    return classes[~is_own].reshape(shape), cosines[~is_own].reshape(shape)
