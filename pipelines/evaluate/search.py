"""Looks images up among others: the nearest by cosine, found exactly."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mhe_dist.errors import UserError
from pipelines.embedding.embed import EmbeddedImages
from pipelines.embedding.embeddings import normalize_embeddings

_QUERIES: Final = 1024  # that are compared together
_GALLERY: Final = 1 << 16  # rows that they are compared with at a time


class SearchResult(NamedTuple):
    """The nearest gallery entries of each query.

    Attributes:
        numbers: int64 `[Q, k]`, of gallery entries, the nearest first.
        scores: float32 `[Q, k]`, cosines.
    """

    numbers: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


def search(gallery: EmbeddedImages, queries: EmbeddedImages, top: int) -> SearchResult:
    """Find the nearest gallery entries of each query.

    Every pair is compared. Where both come from the same source, a query does not find itself.

    Args:
        gallery: what is searched.
        queries: what is looked for.
        top: k, at most as many as there are.

    Raises:
        UserError: one of them is empty, or they are not of the same backbone.
    """
    for name, each in (("--gallery", gallery), ("--query", queries)):
        if not len(each.rows):
            raise UserError(f"{name} {each.source}: no image that can be read")
    if gallery.rows.shape[1] != queries.rows.shape[1]:
        raise UserError(
            f"--gallery {gallery.source}: its embeddings have {gallery.rows.shape[1]} numbers, "
            f"those of this run {queries.rows.shape[1]}; embed it with the same run"
        )
    numbers_of = {key: number for number, key in enumerate(gallery.keys)}
    own = [numbers_of.get(key, -1) for key in queries.keys]
    if gallery.source != queries.source:
        own = [-1] * len(queries.keys)
    excluded = torch.tensor(own)
    count = min(top, len(gallery.rows) - int(bool((excluded >= 0).any())))
    rows, found = _unit(queries), _unit(gallery)
    parts = [
        _nearest(rows[start : start + _QUERIES], found, excluded[start : start + _QUERIES], count)
        for start in range(0, len(rows), _QUERIES)
    ]
    scores, numbers = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return SearchResult(numbers, scores)


def _unit(images: EmbeddedImages) -> torch.Tensor:
    return torch.from_numpy(normalize_embeddings(images.rows).astype(np.float32))


def _nearest(
    rows: torch.Tensor, gallery: torch.Tensor, excluded: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and numbers `[q, count]`; the gallery is read piece by piece."""
    best = torch.full((len(rows), 0), 0.0)
    numbers = torch.zeros((len(rows), 0), dtype=torch.int64)
    for start in range(0, len(gallery), _GALLERY):
        piece = rows @ gallery[start : start + _GALLERY].T
        here = torch.arange(start, start + piece.shape[1])
        piece[here[None] == excluded[:, None]] = -torch.inf
        scores = torch.cat([best, piece], 1)
        ids = torch.cat([numbers, here.expand(len(rows), -1)], 1)
        best, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
        numbers = ids.gather(1, chosen)
    return best, numbers
