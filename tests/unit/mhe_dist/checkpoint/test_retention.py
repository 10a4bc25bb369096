"""Which checkpoints go and which stay."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from mhe_dist.checkpoint.retention import RetentionPolicy, steps_to_delete


def test_keeps_the_newest_complete_ones() -> None:
    assert steps_to_delete({100: True, 200: True, 300: True}, RetentionPolicy(2)) == [100]


def test_remains_of_a_dead_process_go_but_not_one_in_the_making() -> None:
    assert steps_to_delete({100: False, 200: True, 300: False}, RetentionPolicy(2)) == [100]


def test_nothing_goes_while_nothing_is_complete() -> None:
    assert steps_to_delete({100: False, 200: False}, RetentionPolicy()) == []


def test_incomplete_ones_do_not_count_as_kept() -> None:
    assert steps_to_delete({100: True, 200: False, 300: True}, RetentionPolicy(2)) == [200]


def test_steps_that_the_interval_divides_stay() -> None:
    history = dict.fromkeys(range(100, 1000, 100), True)
    assert steps_to_delete(history, RetentionPolicy(1, every=300)) == [100, 200, 400, 500, 700, 800]


def test_the_best_one_stays_and_of_equal_ones_the_newest() -> None:
    history = dict.fromkeys(range(1, 6), True)
    scores = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.1}
    assert steps_to_delete(history, RetentionPolicy(1), scores) == [1, 2, 4]


def test_a_score_is_higher_when_better_and_nan_is_none() -> None:
    assert RetentionPolicy(best="rank1").score({"rank1": 0.5}) == 0.5
    assert RetentionPolicy(best="-loss").score({"loss": 0.5}) == -0.5
    assert RetentionPolicy(best="rank1").score({"rank1": float("nan")}) is None
    assert RetentionPolicy(best="rank1").score({}) is None
    assert RetentionPolicy().score({"rank1": 0.5}) is None


@given(
    st.dictionaries(st.integers(0, 50), st.booleans()),
    st.builds(RetentionPolicy, st.integers(1, 5), st.integers(0, 7)),
    st.dictionaries(st.integers(0, 50), st.floats(0, 1)),
)
def test_never_the_newest_complete_one(
    history: dict[int, bool], policy: RetentionPolicy, scores: dict[int, float]
) -> None:
    gone = steps_to_delete(history, policy, scores)
    complete = [step for step, done in history.items() if done]
    assert len(set(complete) - set(gone)) >= min(policy.last, len(complete))
    if complete:
        assert max(complete) not in gone
        assert all(step < max(complete) for step in gone)
    else:
        assert gone == []
