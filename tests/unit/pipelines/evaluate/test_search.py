"""The nearest entries are those of a plain search over all pairs, however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.embedding.embed import EmbeddedImages
from pipelines.evaluate import search as module
from pipelines.evaluate.search import search


def images(count: int, source: str, seed: int, dim: int = 7) -> EmbeddedImages:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    keys = [f"{source}{number}" for number in range(count)]
    return EmbeddedImages(source, rows, keys, [""] * count, None, [])


@pytest.mark.parametrize("top", [1, 5, 40])
@pytest.mark.parametrize("pieces", [(1024, 1 << 16), (4, 8)])
def test_it_equals_a_plain_search(
    top: int, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUERIES", pieces[0])
    monkeypatch.setattr(module, "_GALLERY", pieces[1])
    gallery, queries = images(30, "g", 1), images(11, "q", 2)
    found = search(gallery, queries, top)
    unit = [each.rows / np.linalg.norm(each.rows, axis=1)[:, None] for each in (queries, gallery)]
    scores = unit[0] @ unit[1].T
    wanted = np.argsort(-scores, axis=1)[:, :top]
    np.testing.assert_array_equal(found.numbers, wanted)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, wanted, 1), atol=1e-6)


def test_in_one_source_each_finds_others_only() -> None:
    gallery = images(20, "g", 1)
    found = search(gallery, gallery, 30)
    assert found.numbers.shape == (20, 19)
    assert not (found.numbers == np.arange(20)[:, None]).any()
    again = search(gallery, gallery._replace(source="a copy"), 1)
    np.testing.assert_array_equal(again.numbers[:, 0], np.arange(20))


def test_nothing_to_compare_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--query q: no image"):
        search(images(3, "g", 1), images(0, "q", 1), 1)
