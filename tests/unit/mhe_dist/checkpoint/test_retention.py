"""Which checkpoints go and which stay."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from mhe_dist.checkpoint.retention import Keep, to_delete


def test_keeps_the_newest_complete_ones() -> None:
    assert to_delete({100: True, 200: True, 300: True}, Keep(2)) == [100]


def test_remains_of_a_dead_process_go_but_not_one_in_the_making() -> None:
    assert to_delete({100: False, 200: True, 300: False}, Keep(2)) == [100]


def test_nothing_goes_while_nothing_is_complete() -> None:
    assert to_delete({100: False, 200: False}, Keep()) == []


def test_incomplete_ones_do_not_count_as_kept() -> None:
    assert to_delete({100: True, 200: False, 300: True}, Keep(2)) == [200]


def test_steps_that_the_interval_divides_stay() -> None:
    history = dict.fromkeys(range(100, 1000, 100), True)
    assert to_delete(history, Keep(1, every=300)) == [100, 200, 400, 500, 700, 800]


def test_the_best_one_stays_and_of_equal_ones_the_newest() -> None:
    history = dict.fromkeys(range(1, 6), True)
    assert to_delete(history, Keep(1), {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.1}) == [1, 2, 4]


def test_a_score_is_higher_when_better_and_nan_is_none() -> None:
    assert Keep(best="rank1").score({"rank1": 0.5}) == 0.5
    assert Keep(best="-loss").score({"loss": 0.5}) == -0.5
    assert Keep(best="rank1").score({"rank1": float("nan")}) is None
    assert Keep(best="rank1").score({}) is None
    assert Keep().score({"rank1": 0.5}) is None


@given(
    st.dictionaries(st.integers(0, 50), st.booleans()),
    st.builds(Keep, st.integers(1, 5), st.integers(0, 7)),
    st.dictionaries(st.integers(0, 50), st.floats(0, 1)),
)
def test_never_the_newest_complete_one(
    history: dict[int, bool], keep: Keep, scores: dict[int, float]
) -> None:
    gone = to_delete(history, keep, scores)
    complete = [step for step, done in history.items() if done]
    assert len(set(complete) - set(gone)) >= min(keep.last, len(complete))
    if complete:
        assert max(complete) not in gone
        assert all(step < max(complete) for step in gone)
    else:
        assert gone == []
