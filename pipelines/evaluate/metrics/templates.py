"""Pools the images of a template to one embedding (docs/formats.md section 3)."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import numpy.typing as npt

from pipelines.evaluate.metrics.roc import Floats, Ints, round_scores

log = logging.getLogger(__name__)

_ROWS: Final = 1 << 14  # images or pairs in float64 at a time


def pool_templates(
    embeddings: npt.NDArray[np.float32], weights: Floats, templates: Ints, media: Ints
) -> tuple[Ints, Floats]:
    """For each template: the mean over each medium, the sum of those means, scaled to length 1.

    So a video counts as much as a photo, however many frames it has.

    Args:
        embeddings: `[N, D]`, with their norms.
        weights: `[N]`, by which each embedding is multiplied: the face detector's score.
        templates, media: `[N]`, ids.

    Returns:
        ids of the templates `[T]`, ascending; rows float64 `[T, D]`; a row of zeros stays zero.
        An embedding that is not finite counts as zeros, with a warning.
    """
    order = np.lexsort((media, templates))
    ids, starts = np.unique(templates[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    rows = np.zeros((len(ids), embeddings.shape[1]))
    first = broken = 0
    while first < len(ids):  # as many whole templates as fit, one at least
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _ROWS, side="right")))
        part = order[starts[first] : ends[last - 1]]
        weighted = embeddings[part].astype(np.float64) * weights[part, None]
        useless = ~np.isfinite(weighted).all(axis=1)
        weighted[useless], broken = 0.0, broken + np.count_nonzero(useless)
        rows[first:last] = _sum_of_means(weighted, templates[part], media[part])
        first = last
    if broken:
        log.warning("%d of %d embeddings are not finite", broken, len(embeddings))
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return ids, rows / np.where(norms > 0, norms, 1.0)


def _sum_of_means(rows: Floats, templates: Ints, media: Ints) -> Floats:
    """Sum of the means over media, for rows that are sorted by template and medium."""
    changes = (templates[1:] != templates[:-1]) | (media[1:] != media[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    counts = np.diff(np.append(starts, len(rows)))
    means = np.add.reduceat(rows, starts) / counts[:, None]
    owners = templates[starts]  # the template of each mean
    firsts = np.concatenate([[0], np.flatnonzero(owners[1:] != owners[:-1]) + 1])
    return np.asarray(np.add.reduceat(means, firsts))


def template_scores(rows: Floats, first: Ints, second: Ints) -> Floats:
    """Rounded dot product of each pair of rows, `[P]`, in bounded memory."""
    out = np.empty(len(first))
    for start in range(0, len(out), _ROWS):
        part = slice(start, start + _ROWS)
        out[part] = np.einsum("nd,nd->n", rows[first[part]], rows[second[part]])
    return round_scores(out)
