"""A map of embeddings: some classes' images as points of the plane."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement
from pipelines.evaluate.metrics.roc import Floats, Ints

CLASSES: Final = 24
IMAGES_PER_CLASS: Final = 16
_ENOUGH: Final = 4  # images of a class that make it worth looking at
_NEIGHBOURS: Final = 15  # of UMAP, its default


def map_embeddings(rows: Floats, labels: Ints, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Some classes drawn at random, and where their images are in the plane.

    UMAP makes the map if the library is installed (`pip install umap-learn`), else the first two
    principal components of the drawn images.

    Args:
        rows: `[N, D]`, rows of length 1.
        labels: int64 `[N]`.
        seed: of the draw, and of UMAP.

    Returns:
        `map_images` int64 `[n]`: numbers of the images, `map_classes` int64 `[n]`, `map_points`
        float32 `[n, 2]`, `map_method` in words. Empty with fewer than three images or numbers.
    """
    chosen = _draw(labels, seed)
    if len(chosen) < 3 or rows.shape[1] < 3:
        return {}
    points, method = _project(rows[chosen], seed)
    return {
        "map_images": chosen,
        "map_classes": labels[chosen],
        "map_points": points.astype(np.float32),
        "map_method": np.array(method),
    }


def _draw(labels: Ints, seed: int) -> Ints:
    """Numbers of the drawn images, those of a class together."""
    classes, counts = np.unique(labels, return_counts=True)
    enough = min(_ENOUGH, int(counts.max(initial=0)))
    classes = classes[counts >= enough]
    rng = generator(seed, "map/classes")
    drawn = classes[sample_without_replacement(len(classes), min(CLASSES, len(classes)), rng)]
    parts = [np.flatnonzero(labels == each)[:IMAGES_PER_CLASS] for each in np.sort(drawn)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _project(rows: Floats, seed: int) -> tuple[Floats, str]:
    try:
        umap = import_module("umap").UMAP
    except (ImportError, AttributeError):  # also another library of that name
        return _principal_components(rows)
    count = min(_NEIGHBOURS, len(rows) - 1)
    model = umap(n_neighbors=count, metric="cosine", random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(rows)), "UMAP, by the cosine"


def _principal_components(rows: Floats) -> tuple[Floats, str]:
    """Coordinates along the two directions of most variance, with a sign of their own."""
    centred = rows - rows.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])
    points = left[:, :2] * sizes[:2] * np.where(signs == 0, 1.0, signs)
    total = float((sizes**2).sum())
    share = float((sizes[:2] ** 2).sum()) / total if total else 0.0
    return points, f"the first two principal components, {share:.0%} of the variance"
