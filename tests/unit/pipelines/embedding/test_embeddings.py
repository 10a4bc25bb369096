"""Rows of length 1."""

from __future__ import annotations

import tracemalloc

import numpy as np

from pipelines.embedding.embeddings import normalize_embeddings, normalize_in_place


def test_rows_get_length_1_in_flat_memory() -> None:
    rows = np.random.default_rng(0).standard_normal((100_000, 32)).astype(np.float32)
    rows[5], rows[9_000] = 0, np.inf
    expected = normalize_embeddings(rows).astype(np.float32)
    tracemalloc.start()
    try:
        normalize_in_place(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(rows, expected)
    assert peak < rows.nbytes, "at once, it takes five times as much"
