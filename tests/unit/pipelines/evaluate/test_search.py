"""The nearest entries are those of a plain search over all pairs, however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.embedding.embed import EmbeddedImages
from pipelines.evaluate import approximate
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


def test_keys_that_repeat_from_tar_to_tar_do_not_hide_the_query_itself() -> None:
    gallery = images(20, "g", 1)
    gallery = gallery._replace(keys=[f"{number % 10:06d}" for number in range(20)])
    found = search(gallery, gallery, 19)
    assert not (found.numbers == np.arange(20)[:, None]).any()
    assert found.scores.max() < 0.999


def test_a_gallery_of_before_the_source_changed_is_matched_by_key_or_refused() -> None:
    now = images(20, "g", 1)
    before = now._replace(rows=now.rows[5:], keys=now.keys[5:], classes=now.classes[5:])
    found = search(before, now, 14)
    assert (found.numbers[:5] < 15).all() and found.scores[:5].max() < 0.999
    assert not (found.numbers[5:] == np.arange(15)[:, None]).any()
    again = [f"{number % 10:06d}" for number in range(20)]
    with pytest.raises(UserError, match=r"g: has changed since the file of --gallery.*embed it"):
        search(before._replace(keys=again[5:]), now._replace(keys=again), 3)


def test_nothing_to_compare_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--query q: no image"):
        search(images(3, "g", 1), images(0, "q", 1), 1)


def test_one_image_alone_has_no_neighbour() -> None:
    """The table of results was an IndexError."""
    one = images(1, "g", 1)
    with pytest.raises(UserError, match="--gallery g: there is nothing beside the query itself"):
        search(one, one, 5)


def clustered(count: int, source: str, seed: int, spread: float = 0.3) -> EmbeddedImages:
    """Images of classes of about 20 each."""
    found = images(count, source, seed, dim=16)
    rng = np.random.default_rng(9)
    centres = rng.normal(size=(100, 16))[np.random.default_rng(seed).integers(0, 100, count)]
    return found._replace(rows=(centres + spread * found.rows).astype(np.float32))


@pytest.fixture
def always_approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_PRODUCTS", 0)
    monkeypatch.setattr(approximate, "_QUERIES_PER_CELL", 0)


def recall(found: module.SearchResult, wanted: module.SearchResult) -> float:
    pairs = zip(found.numbers, wanted.numbers, strict=True)
    return float(np.mean([np.isin(exact, near).mean() for near, exact in pairs]))


@pytest.mark.usefixtures("always_approximate")
def test_a_large_search_is_approximate_and_says_how_well_it_found() -> None:
    gallery, queries = clustered(2000, "g", 1), clustered(300, "q", 2)
    found, wanted = search(gallery, queries, 5), search(gallery, queries, 5, exact=True)
    assert wanted.recall is None and "exact" in wanted.describe()
    assert found.recall is not None and 0.95 <= found.recall <= 1
    assert recall(found, wanted) > 0.93
    assert f"{found.recall:.2%}" in found.describe() and "256 of the queries" in found.describe()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    again = search(gallery, queries, 5)
    assert found.recall == again.recall
    np.testing.assert_array_equal(found.numbers, again.numbers)
    np.testing.assert_array_equal(found.scores, again.scores)


@pytest.mark.usefixtures("always_approximate")
def test_an_approximate_search_finds_others_only() -> None:
    gallery = clustered(1000, "g", 1)
    found, wanted = search(gallery, gallery, 4), search(gallery, gallery, 4, exact=True)
    assert found.recall is not None
    assert not (found.numbers == np.arange(1000)[:, None]).any()
    assert found.numbers.shape == (1000, 4) and (found.numbers >= 0).all()
    assert recall(found, wanted) > 0.93


@pytest.mark.usefixtures("always_approximate")
def test_queries_whose_cells_are_too_small_are_answered_exactly() -> None:
    gallery, queries = clustered(2000, "g", 1), clustered(50, "q", 2)
    found, wanted = search(gallery, queries, 90), search(gallery, queries, 90, exact=True)
    assert (found.numbers >= 0).all() and found.numbers.shape == wanted.numbers.shape


@pytest.mark.usefixtures("always_approximate")
def test_what_has_no_clusters_is_searched_exactly() -> None:
    gallery, queries = images(2000, "g", 1, dim=64), images(40, "q", 2, dim=64)
    found = search(gallery, queries, 5)
    assert found.recall is None
    np.testing.assert_array_equal(found.numbers, search(gallery, queries, 5, exact=True).numbers)


@pytest.mark.parametrize(
    ("gallery", "queries", "dim", "is_approximate"),
    [
        (10_000, 1_000, 512, False),
        (1_000_000, 100, 512, False),  # to make the cells would take longer
        (1_000_000, 10_000, 512, True),
        (1_000_000, 1_000_000, 128, True),
    ],
)
def test_only_what_takes_long_is_approximate(
    gallery: int, queries: int, dim: int, is_approximate: bool
) -> None:
    assert approximate.is_worth_it(gallery, queries, dim) == is_approximate
    assert not hasattr(approximate, "faiss")  # imported where it is needed
