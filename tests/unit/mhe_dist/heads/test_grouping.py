"""Samples grouped by head: each once, and in a width that is the head's own affair."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mhe_dist.heads.grouping import chunks_by_head

Samples = dict[int, tuple[int, list[int]]]


def by_head(heads: torch.Tensor) -> Samples:
    """Width of its chunk, and its samples, for each head."""
    found: Samples = {}
    for chunk in chunks_by_head(heads, max_heads=3):
        filled = torch.ones_like(chunk.index) if chunk.padding is None else ~chunk.padding
        assert filled.sum() > filled.numel() / 2, "less than half is padding"
        for head, index, there in zip(chunk.heads.tolist(), chunk.index, filled, strict=True):
            assert head not in found
            found[head] = (len(index), index[there.bool()].tolist())
    return found


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_a_head_is_summed_up_alike_beside_any_other_heads(drawn: list[int]) -> None:
    """Else a run would round otherwise on another number of ranks, which own other heads."""
    heads = torch.tensor(drawn)
    together = by_head(heads)
    for head in set(drawn):
        samples = (heads == head).nonzero().flatten()
        assert together[head][1] == samples.tolist()
        alone = by_head(heads[samples])[head]
        assert together[head][0] == alone[0]
