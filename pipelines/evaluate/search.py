"""Looks images up among others: the nearest by cosine, found exactly where that is quick."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mhe_dist.errors import UserError
from pipelines.embedding.embed import EmbeddedImages
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.approximate import find_neighbours, is_worth_it

_QUERIES: Final = 1024  # that are compared together
_GALLERY: Final = 1 << 16  # rows that they are compared with at a time


class SearchResult(NamedTuple):
    """The nearest gallery entries of each query.

    Attributes:
        numbers: int64 `[Q, k]`, of gallery entries, the nearest first.
        scores: float32 `[Q, k]`, cosines.
        recall: share of the exact answers to `sampled` queries that is among these; None: every
            pair was compared.
        sampled: how many queries the recall was measured on.
    """

    numbers: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    recall: float | None = None
    sampled: int = 0

    def describe(self) -> str:
        """How it was searched, in words."""
        if self.recall is None:
            return "exact: every pair was compared"
        return (
            f"approximate: it found {self.recall:.2%} of what an exact search finds, measured on "
            f"{self.sampled:,} of the queries"
        )


def search(
    gallery: EmbeddedImages, queries: EmbeddedImages, top: int, exact: bool = False
) -> SearchResult:
    """Find the nearest gallery entries of each query.

    Every pair is compared, or, where that takes long, those that `approximate` chooses. Where both
    come from the same source, a query does not find itself.

    Args:
        gallery: what is searched.
        queries: what is looked for.
        top: k, at most as many as there are.
        exact: compare every pair, however long it takes.

    Raises:
        UserError: one of them is empty, or the gallery holds the query alone; they are not of the
            same backbone; or the gallery is a file of a source that has changed since, and its keys
            do not tell which image is which.
    """
    for name, each in (("--gallery", gallery), ("--query", queries)):
        if not len(each.rows):
            raise UserError(f"{name} {each.source}: no image that can be read")
    if gallery.rows.shape[1] != queries.rows.shape[1]:
        raise UserError(
            f"--gallery {gallery.source}: its embeddings have {gallery.rows.shape[1]} numbers, "
            f"those of this run {queries.rows.shape[1]}; embed it with the same run"
        )
    excluded = torch.tensor(_own_entries(gallery, queries))
    count = min(top, len(gallery.rows) - int(bool((excluded >= 0).any())))
    if not count:
        raise UserError(f"--gallery {gallery.source}: there is nothing beside the query itself")
    rows, entries = _unit(queries), _unit(gallery)
    if not exact and is_worth_it(len(entries), len(rows), rows.shape[1]):
        found = find_neighbours(
            entries.numpy(),
            rows.numpy(),
            count,
            excluded.numpy(),
            lambda chosen: _search_exactly(
                rows[torch.from_numpy(chosen)], entries, excluded[torch.from_numpy(chosen)], count
            )[1].numpy(),
        )
        if found is not None:
            return SearchResult(*found)
    scores, numbers = _search_exactly(rows, entries, excluded, count)
    return SearchResult(numbers.numpy(), scores.numpy())


def _own_entries(gallery: EmbeddedImages, queries: EmbeddedImages) -> list[int]:
    """For each query the number of the gallery entry that is the same image; -1: there is none.

    Keys of shards may repeat from tar to tar, so an unchanged source is matched by position.

    Raises:
        UserError: see `search`.
    """
    if gallery.source != queries.source:
        return [-1] * len(queries.keys)
    if gallery.keys == queries.keys:
        return list(range(len(queries.keys)))
    if any(len(set(each.keys)) < len(each.keys) for each in (gallery, queries)):
        raise UserError(
            f"{gallery.source}: has changed since the file of --gallery was written, and several "
            "of its images have the same key, so that a query could find itself: embed it again"
        )
    numbers_of = {key: number for number, key in enumerate(gallery.keys)}
    return [numbers_of.get(key, -1) for key in queries.keys]


def _search_exactly(
    rows: torch.Tensor, entries: torch.Tensor, excluded: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and numbers `[n, count]` of the nearest entries, the queries in portions."""
    parts = [
        _nearest(rows[start : start + _QUERIES], entries, excluded[start : start + _QUERIES], count)
        for start in range(0, len(rows), _QUERIES)
    ]
    scores, numbers = (torch.cat(each) for each in zip(*parts, strict=True))
    return scores, numbers


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
        own = excluded - start
        (here,) = torch.nonzero((own >= 0) & (own < piece.shape[1]), as_tuple=True)
        piece[here, own[here]] = -torch.inf
        # The best of a piece first: that reads it once, whatever was found before.
        scores, chosen = piece.topk(min(count, piece.shape[1]), dim=1)
        scores, ids = torch.cat([best, scores], 1), torch.cat([numbers, chosen + start], 1)
        best, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
        numbers = ids.gather(1, chosen)
    return best, numbers
