"""Classes of similar size: large ones are split, and the places of empty and tiny ones are used."""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np

from pipelines.clustering.assign import Labels, label_images, open_labels, open_search
from pipelines.clustering.hierarchy import train_part
from pipelines.clustering.members import count_classes, sort_members
from pipelines.clustering.rows import Ints, UnitRows
from pipelines.clustering.settings import ClusterSettings
from pipelines.clustering.state import ClusterState

_TINY: Final = 0.25  # of the average: a class up to which may be dissolved for a large one


def balance_classes(rows: UnitRows, settings: ClusterSettings, state: ClusterState) -> Labels:
    """Label all images, and make their classes more equal in size, in a few rounds.

    A class is as large as there are images that it is the nearest of. In each round the centres of
    empty classes, then those of tiny ones while a class is above the bound, are given up, and
    large classes get them: a k-means among their images. Then all images are labelled again.

    Returns:
        The labels after the last round.
    """
    for number in range(settings.rounds + 1):
        name = f"labels-{number}"
        if state.is_done(f"balanced-{number}"):
            continue
        search = open_search(state, settings, rows.dim, _layout(number))
        labels = label_images(rows, search, settings, state, name)
        if number == settings.rounds or not _split_large(rows, labels, settings, state, number):
            break
        state.mark(f"balanced-{number}")
        state.remove(f"members-{number}")
    return open_labels(state, settings, rows.count)


def last_layout(settings: ClusterSettings, state: ClusterState) -> str:
    """Name of the cells and owners that the last round left."""
    rounds = range(settings.rounds)
    return _layout(sum(state.is_done(f"balanced-{number}") for number in rounds))


def _layout(number: int) -> str:
    return f"layout-{number}" if number else "layout"


def plan_splits(counts: Ints, bound: float) -> list[tuple[int, Ints]]:
    """Which classes are split, and whose places they get; int64 arrays of class ids.

    Each place goes to the class with the most images for each of its places so far: places of empty
    classes as long as there is a class with two images for each, places of tiny ones as long as
    there is one above the bound.

    Args:
        counts: int64 `[C]`, images of each class.
        bound: images above which a class is too large.
    """
    empty = np.flatnonzero(counts == 0)
    tiny = np.flatnonzero((counts > 0) & (counts <= _TINY * counts.mean()))
    tiny = tiny[np.argsort(counts[tiny], kind="stable")]
    wanted = int(np.ceil(counts[counts > bound] / max(bound, 1.0)).sum())
    places = np.concatenate([empty, tiny[:wanted]])
    remaining = np.setdiff1d(np.flatnonzero(counts > 1), places)
    largest = remaining[np.argsort(-counts[remaining], kind="stable")][: len(places)]
    heap = [(-float(counts[each]), int(each)) for each in largest]
    heapq.heapify(heap)
    given: dict[int, list[int]] = {}
    for position, freed in enumerate(places.tolist()):
        if not heap or (position >= len(empty) and -heap[0][0] <= bound):
            break
        _, chosen = heapq.heappop(heap)
        given.setdefault(chosen, []).append(freed)
        parts = len(given[chosen]) + 1
        if counts[chosen] > parts:
            heapq.heappush(heap, (-float(counts[chosen]) / parts, chosen))
    return [(each, np.array(got, np.int64)) for each, got in sorted(given.items())]


def _split_large(
    rows: UnitRows, labels: Labels, settings: ClusterSettings, state: ClusterState, number: int
) -> bool:
    """Split what `plan_splits` says; False: nothing is to be split."""
    first = labels.classes[:, 0]
    counts = count_classes(first, settings.classes)
    bound = settings.max_size * rows.count / settings.classes or np.inf
    plan = plan_splits(counts, bound)
    if not plan:
        return False
    members = sort_members(state, f"members-{number}", first, settings.classes)
    centres = state.array("centres", (settings.classes, rows.dim), "float32")
    layout = state.load_small(_layout(number))
    for chosen, places in plan:
        layout["owners"][places] = layout["owners"][chosen]

    def _split(piece: int) -> None:
        chosen, places = plan[piece]
        key = ("split classes", number, chosen)
        found = train_part(rows, members.of(chosen), len(places) + 1, settings, *key)
        centres[[chosen, *places]] = found

    state.run(f"split-{number}", len(plan), _split)
    state.save_small(_layout(number + 1), **layout)
    return True
