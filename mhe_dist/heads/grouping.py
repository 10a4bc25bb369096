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


def chunks_by_head(heads: Tensor, most_heads: int) -> list[Chunk]:
    """Group samples by head, heads with like many samples together.

    Args:
        heads: head of each sample `[n]`.
        most_heads: heads in a chunk at most.

    Returns:
        Chunks that cover each head once; a chunk wastes less than half of its places on padding.
    """
    unique, inverse, counts = np.unique(heads.numpy(), return_inverse=True, return_counts=True)
    samples = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    by_count = np.argsort(-counts, kind="stable")
    chunks, at = [], 0
    while at < len(unique):
        most = int(counts[by_count[at]])
        alike = np.searchsorted(-counts[by_count], -((most + 1) // 2), side="right")
        picked = by_count[at : min(at + most_heads, int(alike))]
        place = np.arange(most)[None, :]
        padding = place >= counts[picked][:, None]
        index = samples[starts[picked][:, None] + np.where(padding, 0, place)]
        chunks.append(
            Chunk(
                torch.from_numpy(unique[picked]),
                torch.from_numpy(index),
                torch.from_numpy(padding) if padding.any() else None,
            )
        )
        at += len(picked)
    return chunks


# Extra logits of a rank that are kept between the two passes over them; beyond, they are remade.
LOGITS_BYTES = 1 << 28


class OwnScores(NamedTuple):
    """The rows' gradient from own heads, by sample, scaled.

    Attributes:
        features: `[n, D]`.
        weights: `a` of each sample against its own head `[n, L]`.
        along: `b` of each sample `[n, L]`.
    """

    features: Tensor
    weights: Tensor
    along: Tensor

    @staticmethod
    def join(rounds: list[OwnScores]) -> OwnScores:
        """The samples of several rounds, one after the other."""
        return (
            rounds[0] if len(rounds) == 1 else OwnScores(*map(torch.cat, zip(*rounds, strict=True)))
        )
