"""Draws pairs for 1:1 verification from a labelled set, without listing all of them."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.seeds import generator, sample_without_replacement

Ints = npt.NDArray[np.int64]

_COMPARED: Final = 1 << 14  # pairs at a time


class SamplePairs(NamedTuple):
    """P pairs of samples.

    Attributes:
        first, second: int64 `[P]`, numbers of the samples.
        same: bool `[P]`: of one class.
    """

    first: Ints
    second: Ints
    same: npt.NDArray[np.bool_]


def draw_pairs(labels: Ints, count: int, seed: int) -> SamplePairs:
    """Draw distinct pairs in the order same, different, same, ..., each kind uniformly.

    So contiguous folds hold equally many of both kinds. Same pairs are sorted by class, so that
    folds hardly share classes, as in LFW.

    Args:
        labels: int64 `[N]`.
        count: number of pairs; it is smaller if the set has too few pairs of either kind.
        seed: alone decides the draw.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    ends = np.repeat(np.cumsum(sizes), sizes)
    positions = np.arange(len(labels))
    # Partners of a sample that come after it in `order`: within its class, and beyond it.
    within, beyond = ends - positions - 1, len(labels) - ends
    half = min(count // 2, int(within.sum()), int(beyond.sum()))
    pairs = np.empty((2 * half, 2), np.int64)
    kinds = (("same", within, positions + 1), ("different", beyond, ends))
    for kind, (name, partners, first) in enumerate(kinds):
        rng = generator(seed, f"pairs/{name}")
        drawn = sample_without_replacement(int(partners.sum()), half, rng)
        starts = np.concatenate([[0], np.cumsum(partners)])
        left = np.searchsorted(starts, drawn, side="right") - 1
        right = first[left] + drawn - starts[left]
        pairs[kind::2] = order[np.stack([left, right], axis=1)]
    return SamplePairs(pairs[:, 0], pairs[:, 1], np.arange(2 * half) % 2 == 0)


def squared_distances(
    embeddings: npt.NDArray[np.float64], pairs: SamplePairs
) -> npt.NDArray[np.float64]:
    """Squared L2 distance of each pair, `[P]`, between rows of length 1: 0 to 4.

    A row of zeros (`normalize_embeddings`) tells nothing of its image: its pairs count as wrong,
    0 if they are of two classes, else 4. Zeros alone would lie on each other.
    """
    out = np.empty(len(pairs.same))
    dead = np.logical_not(embeddings.any(axis=1))
    for start in range(0, len(out), _COMPARED):
        part = slice(start, start + _COMPARED)
        first, second = pairs.first[part], pairs.second[part]
        difference = embeddings[first] - embeddings[second]
        found = np.einsum("nd,nd->n", difference, difference)
        out[part] = np.where(dead[first] | dead[second], 4.0 * pairs.same[part], found)
    return out
