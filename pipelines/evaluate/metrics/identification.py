"""Probes against a gallery: rank-k identification, and TAR at FAR over all their pairs.

Scores are computed in chunks and never kept as a whole. They are rounded to 12 decimals, so that
equal embeddings get equal scores wherever a matrix product puts them; ties count against the model.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics.roc import Floats, Ints, Roc, RocCollector, round_scores

_CHUNK: Final = 1 << 22  # scores in memory at a time: 32 MB


class Identification(NamedTuple):
    """The result of comparing every probe with the whole gallery.

    Attributes:
        ranks: int64 `[P]`, 1 + number of other classes that score at least as high as the probe's
            own; 0 for a probe whose class is not enrolled.
        classes: number of enrolled classes.
        roc: of all pairs of a probe and a gallery entry.
        nearest: int64 `[P, k]`, numbers of the k best gallery entries, best first.
        scores: `[P, k]`, the scores of `nearest`.
    """

    ranks: Ints
    classes: int
    roc: Roc
    nearest: Ints
    scores: Floats

    def rank(self, k: int) -> float:
        """Share of the enrolled probes whose class is among the k best."""
        enrolled = self.ranks[self.ranks > 0]
        return float(np.mean(enrolled <= k)) if len(enrolled) else math.nan

    def chance(self, k: int) -> float:
        """`rank(k)` of a random order of the classes."""
        return min(1.0, k / self.classes)

    def tpir(self, fpir: float) -> float:
        """True positive identification rate at a false positive identification rate, open set.

        The threshold is the lowest at which at most a share `fpir` of the probes that are not
        enrolled match any entry. The figure is the share of the enrolled probes whose best match
        is their own class, above the threshold. It is NaN without probes of both kinds.
        """
        enrolled, best = self.ranks > 0, self.scores[:, 0]
        strangers = -np.sort(-best[~enrolled])
        if not len(strangers) or not enrolled.any():
            return math.nan
        allowed = math.floor(fpir * len(strangers) + 1e-9)
        limit = strangers[allowed] if allowed < len(strangers) else -math.inf
        return float(np.mean((self.ranks == 1)[enrolled] & (best[enrolled] > limit)))


def identify(
    gallery: Floats,
    gallery_labels: Ints,
    probes: Floats,
    probe_labels: Ints,
    nearest: int = 5,
    max_far: float = 0.1,
) -> Identification:
    """Compare every probe with every gallery entry by the cosine.

    Args:
        gallery: `[G, D]`, rows of length 1.
        gallery_labels: `[G]`; a class may have several entries, the best one counts.
        probes: `[P, D]`, rows of length 1.
        probe_labels: `[P]`.
        nearest: k, number of gallery entries to return for each probe.
        max_far: largest FAR that will be requested; bounds how many impostor scores are kept.

    Raises:
        UserError: no gallery or no probes.
    """
    if not len(gallery) or not len(probes):
        raise UserError(f"identification: {len(gallery)} gallery entries, {len(probes)} probes")
    order = np.argsort(gallery_labels, kind="stable")
    gallery, names = gallery[order], gallery_labels[order]
    classes, first = np.unique(names, return_index=True)
    matches = np.searchsorted(names, probe_labels, "right") - np.searchsorted(names, probe_labels)
    collector = RocCollector(len(probes) * len(names) - int(matches.sum()), max_far)
    k = min(nearest, len(names))
    ranks, best, top = [], [], []
    chunk = max(1, _CHUNK // len(names))
    for start in range(0, len(probes), chunk):
        labels = probe_labels[start : start + chunk]
        scores = round_scores(probes[start : start + chunk] @ gallery.T)
        collector.add(scores, labels[:, None] == names[None, :])
        ranks.append(_ranks(np.maximum.reduceat(scores, first, axis=1), classes, labels))
        top.append(_top_columns(scores, k))
        best.append(np.take_along_axis(scores, top[-1], axis=1))
    return Identification(
        np.concatenate(ranks),
        len(classes),
        collector.roc(),
        order[np.concatenate(top)],
        np.concatenate(best),
    )


def _ranks(scores: Floats, classes: Ints, labels: Ints) -> Ints:
    """Ranks of the probes' own classes, from the best score of each class, `[p, classes]`."""
    column = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    own = scores[np.arange(len(labels)), column]
    ranks = (scores >= own[:, None]).sum(axis=1)  # its own class is the 1
    return np.where(classes[column] == labels, ranks, 0)


def _top_columns(scores: Floats, k: int) -> Ints:
    """Columns of the k highest scores of each row, highest first; of equal scores the first one."""
    chosen = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)
