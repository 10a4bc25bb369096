"""Samples sorted by head and cut into chunks, so that scoring needs no loop over samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Heads that are scored together, each against the samples that belong to it.

    Attributes:
        heads: global numbers `[T]`, host.
        index: `[T, c]`, the samples of each head; padded with its first one.
        padding: `[T, c]`, True where `index` is padding; None if nothing is.
    """

    heads: Tensor
    index: Tensor
    padding: Tensor | None


def chunks_by_head(heads: Tensor, max_heads: int) -> list[Chunk]:
    """Group samples by head; heads with a similar number of samples share a chunk.

    `c` is the least power of two that a head needs, so that it does not depend on the other heads
    of a rank: sums over `c` samples are formed in another order for another c, and a run on another
    number of ranks would round otherwise.

    Args:
        heads: head of each sample `[n]`.
        max_heads: heads in a chunk at most.

    Returns:
        Chunks that cover each head once; a chunk wastes less than half of its entries on padding.
    """
    unique, inverse, counts = np.unique(heads.numpy(), return_inverse=True, return_counts=True)
    samples = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    by_count = np.argsort(-counts, kind="stable")
    chunks, begin = [], 0
    while begin < len(unique):
        largest = 1 << (int(counts[by_count[begin]]) - 1).bit_length()
        least = largest // 2 + 1
        similar = np.searchsorted(-counts[by_count], -least, side="right")
        picked = by_count[begin : min(begin + max_heads, int(similar))]
        column = np.arange(largest)[None, :]
        padding = column >= counts[picked][:, None]
        index = samples[starts[picked][:, None] + np.where(padding, 0, column)]
        chunks.append(
            Chunk(
                torch.from_numpy(unique[picked]),
                torch.from_numpy(index),
                torch.from_numpy(padding) if padding.any() else None,
            )
        )
        begin += len(picked)
    return chunks


class GradientFactors(NamedTuple):
    """The gradient of rows before it is summed over samples: a unit of L rows for each sample.

    The gradient of a row `w` is the sum over samples of `weight * feature + radial * w`, already
    scaled.

    Attributes:
        features: `[n, D]`.
        weights: `[n, L]`.
        radial: `[n, L]`.
    """

    features: Tensor
    weights: Tensor
    radial: Tensor

    @staticmethod
    def join(parts: list[GradientFactors]) -> GradientFactors:
        """The samples of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return GradientFactors(
            torch.cat([part.features for part in parts]),
            torch.cat([part.weights for part in parts]),
            torch.cat([part.radial for part in parts]),
        )
