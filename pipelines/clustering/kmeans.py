"""Spherical k-means and the search for the nearest centres, by faiss on one core for each call.

A call on several cores gives other last bits than on one. So each call has one, cores work on
different pieces at the same time, and the classes do not depend on their number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.clustering.rows import Rows
from pipelines.clustering.settings import ITERATIONS

Positions = npt.NDArray[np.int64]


def spherical_kmeans(points: Rows, centres: int, seed: int) -> Rows:
    """Centres of length 1 that the points' cosines to their nearest one are largest for.

    Centres begin at points that are drawn. A centre that no point is nearest to is moved beside one
    with many points, as faiss does.

    Args:
        points: float32 `[n, D]` of length 1, at least as many as centres.
        centres: k.
        seed: of the first centres, in `[0, 2**31)`.

    Returns:
        float32 `[k, D]`.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    trained = faiss.Kmeans(
        points.shape[1],
        centres,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # what is given was drawn already
    )
    trained.train(points)
    found: Any = trained.centroids
    return np.asarray(found)


def find_nearest(rows: Rows, centres: Rows, count: int) -> tuple[Rows, Positions]:
    """The nearest centres of each row by their inner product, the nearest first.

    Args:
        rows: float32 `[n, D]`.
        centres: float32 `[k, D]`.
        count: at most k.

    Returns:
        Inner products float32 `[n, count]` and positions among the centres int64 `[n, count]`.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    products, positions = faiss.knn(rows, centres, count, metric=faiss.METRIC_INNER_PRODUCT)
    return products, positions.astype(np.int64)
