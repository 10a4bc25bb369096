"""Tables of an index as text, and back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shards.packing import pack_labels, pack_offsets, unpack_labels, unpack_offsets


@settings(deadline=None)
@given(st.lists(st.integers(1, 2**20), max_size=50), st.integers(0, 3))
def test_offsets_round_trip(lengths: list[int], first: int) -> None:
    offsets = [first * 512]
    for length in lengths:
        offsets.append(offsets[-1] + 512 * length)
    assert list(unpack_offsets(pack_offsets(offsets), len(offsets))) == offsets


@given(st.lists(st.integers(0, 2**63 - 1), max_size=50))
def test_labels_round_trip(labels: list[int]) -> None:
    assert unpack_labels(pack_labels(labels), len(labels)).tolist() == labels
