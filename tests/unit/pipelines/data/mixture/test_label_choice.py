"""Which of its classes a sample shows: at most K, keyed by seed, epoch and sample alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.mixture.label_choice import choose_labels
from tests.support.data.label_sets import as_lists

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=12)


def choose(lists: list[list[int]], limit: int, epoch: int = 0, first: int = 0) -> list[list[int]]:
    numbers = np.arange(first, first + len(lists))
    table = choose_labels(as_lists(lists), limit, numbers, 5, epoch)
    assert table.shape == (len(lists), limit)
    return table.tolist()


@settings(deadline=None, max_examples=60)
@given(lists=LISTS, limit=st.integers(1, 8), epoch=st.integers(0, 99))
def test_a_sample_shows_distinct_classes_of_its_own(
    lists: list[list[int]], limit: int, epoch: int
) -> None:
    for given_ids, row in zip(lists, choose(lists, limit, epoch), strict=True):
        shown = [label for label in row if label >= 0]
        assert row == shown + [-1] * (limit - len(shown))
        assert shown == sorted(set(shown)) and set(shown) <= set(given_ids)
        assert len(shown) == min(limit, len(set(given_ids)))


@settings(deadline=None, max_examples=30)
@given(lists=LISTS, limit=st.integers(1, 4), epoch=st.integers(0, 99))
def test_the_choice_does_not_depend_on_the_samples_asked_for_with_it(
    lists: list[list[int]], limit: int, epoch: int
) -> None:
    whole = choose(lists, limit, epoch, first=40)
    alone = [choose([each], limit, epoch, first=40 + n)[0] for n, each in enumerate(lists)]
    assert whole == alone
    assert whole == choose([each[::-1] * 2 for each in lists], limit, epoch, first=40)


def test_every_class_of_a_sample_is_as_likely_as_any_other() -> None:
    counts: Counter[tuple[int, ...]] = Counter()
    for epoch in range(50):
        counts.update(tuple(row) for row in choose([[3, 1, 8, 4]] * 60, 2, epoch))
    assert len(counts) == 6
    # 500 expected of each pair, standard deviation 20.4
    assert all(400 < count < 600 for count in counts.values()), counts


def test_the_choice_is_the_one_that_it_was() -> None:
    """A resumed run must draw what it drew before, with any release."""
    assert choose([[3, 1, 8, 4], [0, 7, 2], [5]], 2, epoch=3) == [[3, 8], [0, 2], [5, -1]]
